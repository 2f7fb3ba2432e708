//! Tells the linker where torch's libraries lie now.
//!
//! torch-sys remembers the folder from when it was compiled, and pip's build environment is gone after its build: the next
//! build in the same tree would link against a folder that no longer exists.

use std::{env, process::Command};

/// Finds torch without importing it.
const FIND: &str =
    "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_TCH").is_none() {
        return;
    }
    for name in ["VIRTUAL_ENV", "PYTHONPATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    // The interpreter that torch-sys asks.
    let python = if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let found = Command::new(python).args(["-c", FIND]).output();
    match found {
        Ok(output) if output.status.success() => {
            println!(
                "cargo:rustc-link-search=native={}/lib",
                String::from_utf8_lossy(&output.stdout)
            );
        }
        _ => {
            println!("cargo:warning=sokd: {python} has no torch; the feature tch needs it to build")
        }
    }
}
