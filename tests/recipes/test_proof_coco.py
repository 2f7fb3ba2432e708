"""articles.py's set, and proof_coco.py on a few images of it."""

from __future__ import annotations

import csv
import json

import articles
import coco
import proof_coco
import pytest
import torch
from support.recipes import write_idx
from torchvision.io import decode_image

pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_boxes_are_exact_and_drawn_from_the_seed(tmp_path):
    """Every article is alone in its box, touches all four sides, and comes again with the seed."""
    source = str(write_idx(tmp_path / "idx"))
    for name in ("one", "two"):
        articles.main(
            ["--out", str(tmp_path / name), "--source", source, "--train", "6", "--val", "3"]
        )
    texts = [
        (tmp_path / name / "annotations" / "instances_train2017.json").read_text()
        for name in ("one", "two")
    ]
    content = json.loads(texts[0])
    assert texts[0] == texts[1] and len(content["images"]) == 6 and content["annotations"]
    assert (tmp_path / "one" / "val2017" / "000002.png").exists()
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 128 and y + height <= 128
        assert each["area"] == width * height and 1 <= each["category_id"] <= 10
    for number in range(6):
        first, again = (
            decode_image(str(tmp_path / name / "train2017" / f"{number:06}.png"))
            for name in ("one", "two")
        )
        assert first.shape == (3, 128, 128) and torch.equal(first, again)
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == 0]
    covered = torch.zeros(128, 128)
    for x, y, width, height in boxes:
        covered[y : y + height, x : x + width] += 1
    assert covered.max() == 1


def test_a_box_is_the_smallest_one_around_its_article():
    """On a dark canvas without clutter the bright pixels of each article reach its box's sides."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 10:20, 6:28] = 255
    random = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(articles, "clutter", lambda *_: torch.zeros(128, 128))
        canvas, found = articles.draw([(image, 3)], random)
    assert found and all(label == 3 for _, label in found)
    for (x, y, width, height), _ in found:
        part = canvas[0, y : y + height, x : x + width] > 0
        assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
        canvas[0, y : y + height, x : x + width] = 0
    assert not canvas.any()


def test_rows_a_picture_and_a_second_call(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof_coco, "METHODS", ("none", "fitnet=0.3"))
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    page = docs / "results.md"
    page.write_text("before\n<!-- detection: x -->\nold\n<!-- /detection -->\nafter\n")
    given = ["--out", str(tmp_path / "out"), "--source", str(write_idx(tmp_path / "idx"))]
    given += ["--train", "8", "--val", "3", "--epochs", "1", "--teacher-epochs", "1"]
    given += ["--seeds", "1", "--docs", str(docs)]
    proof_coco.main(given)
    with (docs / "results" / "detection.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"teacher (small32)", "none", "fitnet", "fitnet+sokd"}
    assert all(0 <= float(row["last_AP"]) <= float(row["last_AP50"]) for row in rows)
    assert (docs / "results" / "detection.png").stat().st_size > 1000
    text = page.read_text()
    assert text.startswith("before\n<!-- detection: x -->\n| run | AP |") and "old" not in text
    assert text.endswith("<!-- /detection -->\nafter\n") and "| fitnet+sokd |" in text
    monkeypatch.setattr(coco, "main", None)
    proof_coco.main(given)
    assert page.read_text() == text and capsys.readouterr().out.count("| fitnet |") == 2
