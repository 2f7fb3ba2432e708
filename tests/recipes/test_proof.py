"""proof.py on a few random images: its rows, and that a second call trains nothing."""

import csv

import cifar100
import proof
import pytest
import torch
from support.recipes import write_idx


def test_rows_and_a_second_call(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.setattr(proof, "METHODS", ("none", "kd"))
    small = ["--samples", "8", "--epochs", "1", "--batch-size", "4"]
    given = [*small, "--data", str(write_idx(tmp_path / "idx")), "--out", str(tmp_path / "out")]
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "results.md").write_text("a\n<!-- classification: -->\nold\n<!-- /classification -->\n")
    proof.main([*given, "--seeds", "1", "--docs", str(docs)])
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = {(row["method"], row["seed"]) for row in rows}
    assert named == {("teacher (resnet20)", "0"), ("none", "0"), ("kd", "0"), ("kd+sokd", "0")}
    assert all(0 <= float(row["last_top1"]) <= 100 and row["threads"] == "1" for row in rows)
    shown = capsys.readouterr().out
    assert shown.count("\n| kd") == 2
    page, runs = (docs / "results.md").read_text(), (docs / "results" / "classification.csv")
    assert page.startswith("a\n<!-- classification: -->\n| run |") and "old" not in page
    assert page.split("\n")[2:-2] == shown.split("\n")[-7:-1]
    assert runs.read_text() == (tmp_path / "out" / "runs.csv").read_text()
    with pytest.raises(SystemExit, match="has no markers <!-- none: -->"):
        proof.publish("", tmp_path / "out", docs, "none")
    monkeypatch.setattr(cifar100, "main", None)
    proof.main([*given, "--seeds", "1"])
