//! Python with the reference page's clients, from `tests/setup/python.sh`.

use std::path::PathBuf;
use std::process::Command;

use crate::folder::{root, target};

/// Python of the private environment, ready for a script and its arguments.
pub fn command() -> Command {
    let python: PathBuf = target().join("venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run `make setup` (or {})",
        python.display(),
        root().join("tests/setup/python.sh").display()
    );
    Command::new(python)
}
