//! Node.js with the reference page's clients, from `tests/setup/node.sh`.

use std::process::Command;

use crate::folder::{root, target};

/// Node.js with the private packages, ready for a script and its arguments.
pub fn command() -> Command {
    let packages = target().join("node/node_modules");
    assert!(
        packages.exists(),
        "{} is missing: run `make setup` (or {})",
        packages.display(),
        root().join("tests/setup/node.sh").display()
    );
    let mut command = Command::new("node");
    command.env("NODE_PATH", packages);
    command
}
