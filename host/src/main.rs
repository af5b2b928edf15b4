//! The program: the compile child of plugins, or the command line.

use std::process::ExitCode;

use headworks::{cli, plugin};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // First of all: this child runs under limits, with nothing else started.
    if args.next().is_some_and(|first| first == plugin::CHILD_COMMAND) {
        return plugin::compile_child_main(args);
    }
    cli::main()
}
