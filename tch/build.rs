//! Passes the folder of torch's libraries to the linker, and their release to the code.
//!
//! torch-sys keeps the folder of its compilation, and pip removes its build environment after a
//! build: the next build in the same tree would link against a folder that no longer exists.

use std::{env, process::Command};

/// Finds torch without importing it.
const FIND: &str = "import importlib.util as u, importlib.metadata as m
print(u.find_spec('torch').submodule_search_locations[0], m.version('torch'), sep='\\n', end='')";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in ["VIRTUAL_ENV", "PYTHONPATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    // The interpreter that torch-sys runs.
    let python = if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let output = Command::new(python).args(["-c", FIND]).output();
    let found = output.ok().filter(|output| output.status.success());
    let found = found.and_then(|output| String::from_utf8(output.stdout).ok());
    let Some((folder, release)) = found.as_deref().and_then(|text| text.split_once('\n')) else {
        panic!("sokd-tch needs torch 2.13 to build, and {python} has no torch");
    };
    println!("cargo:rustc-link-search=native={folder}/lib");
    println!("cargo:rustc-env=SOKD_TCH_TORCH={release}");
}
