//! The demo without a terminal: it does all by itself, and its numbers are right.

use std::process::{Command, Stdio};

use headworks_tests::folder::{root, target};
use headworks_tests::process::run;

#[test]
fn the_demo_runs_by_itself_and_its_numbers_add_up() {
    let mut command = Command::new(target().join("release/headworks-demo"));
    let text = run(command.current_dir(root()).arg("--check").stdin(Stdio::null()));
    for wanted in ["rows", "alerts", "dead letters", "messages/s"] {
        assert!(text.contains(wanted), "the demo does not show {wanted:?}:\n{text}");
    }
    assert!(text.contains("check: ok"), "{text}");
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
        assert!(!line.contains('\u{1b}'), "colour without a terminal: {line}");
    }
}
