//! Commands and their options, with the help texts.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::streams::From;
use crate::access::{ITERATIONS_MAX, ITERATIONS_MIN};
use crate::telemetry::LogFormat;

#[derive(Debug, Parser)]
#[command(
    name = "headworks",
    version,
    about = "Receives device messages over MQTT and HTTP, runs WebAssembly plugins, writes rows to databases",
    arg_required_else_help = true,
    max_term_width = 80,
    after_help = "Start here:\n  headworks run                      MQTT on 127.0.0.1:1883, rows in ./data/telemetry.db\n  \
        headworks run --config hw.yaml     with a config file\n  \
        headworks validate --config hw.yaml\n  \
        headworks status                   what is wrong, and what to do"
)]
pub struct Cli {
    /// What to log to stderr: a level, or target=level, comma-separated [default: RUST_LOG, otherwise info]
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    /// Format of log lines: `compact` for people, `json` for programs
    #[arg(long, global = true, value_enum, default_value = "compact")]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the host until Ctrl-C or SIGTERM
    #[command(after_help = "Examples:\n  headworks run\n  headworks run --config headworks.yaml\n  \
        headworks run --config /etc/headworks.d   (every .yaml file in the folder)\n\n\
        Without a config: MQTT on 127.0.0.1:1883, admin on 127.0.0.1:8080, plugins from ./plugins,\n\
        all data in ./data, rows in the table `telemetry` of ./data/telemetry.db.")]
    Run(ConfigArgs),
    /// Check a config: print all problems with file and line, or what would run
    #[command(
        after_help = "Exit codes: 0 valid, 1 a sink would not write (--connect), 2 the config is wrong.\n\n\
        Examples:\n  headworks validate --config headworks.yaml\n  \
        headworks validate --config headworks.yaml --connect"
    )]
    Validate(ValidateArgs),
    /// Print the problems of the running host and what to do; exit code 0: none, 1: a problem or no answer, 3: not running
    Status(StatusArgs),
    /// Create, list, inspect, benchmark and remove plugins
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// List streams and print their messages; works while the host runs
    #[command(subcommand)]
    Streams(StreamsCommand),
    /// Summarize, list, show, redrive (send again) and discard rejected messages
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// List, show, disconnect and delete MQTT clients; the host must run
    #[command(subcommand)]
    Clients(ClientsCommand),
    /// Add, change or delete a user in a password file
    #[command(
        after_help = "The password is read twice from the terminal, without echo. Without a terminal it is the first\n\
        line of stdin. The running host reloads the changed file by itself.\n\nExamples:\n  \
        headworks passwd passwords ann\n  headworks passwd passwords ann --delete\n  headworks passwd passwords ann --scram"
    )]
    Passwd(PasswdArgs),
    /// Print the JSON Schema of the config, for editors
    Schema,
}

#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// A YAML file, or a folder of YAML files [default: the embedded config]
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct PasswdArgs {
    /// The password file; created if missing
    pub file: PathBuf,
    /// Name of the user
    pub user: String,
    /// Delete the user
    #[arg(long)]
    pub delete: bool,
    /// Also allow SCRAM-SHA-256 logins (MQTT 5)
    #[arg(long, conflicts_with = "delete")]
    pub scram: bool,
    /// SCRAM iterations, which each login costs the client [default: 600000]
    #[arg(long, value_name = "N", requires = "scram", value_parser = clap::value_parser!(u32).range(i64::from(ITERATIONS_MIN)..=i64::from(ITERATIONS_MAX)))]
    pub scram_iterations: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct ValidateArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Also connect to every sink, log in and compare its table with the config; writes nothing
    ///
    /// The command waits for a server for at most `connect_timeout` of its sink (10 s by default) for
    /// each host of its url, and as long again if the server stops answering after the login. All sinks
    /// are tried at the same time. The exit code is 1 if a sink would not write.
    #[arg(long)]
    pub connect: bool,
    #[command(flatten)]
    pub format: FormatArgs,
}

#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub format: FormatArgs,
}

#[derive(Clone, Copy, Debug, Default, Args)]
pub struct FormatArgs {
    /// `json`: one object a line, for scripts
    #[arg(long, value_enum, default_value = "text")]
    pub format: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Create a folder with an example plugin in Rust
    #[command(after_help = "Example:\n  headworks plugin new check-limits --sdk headworks/guest-sdk")]
    New {
        /// The folder to create; its name becomes the plugin's name
        name: PathBuf,
        /// Folder of the SDK: `guest-sdk` in the sources of Headworks
        #[arg(long, value_name = "DIR")]
        sdk: PathBuf,
    },
    /// List the plugins of the folder, in the order in which they run
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Print the name, version and imports of a plugin file, or why it cannot run
    #[command(after_help = "Example:\n  headworks plugin inspect plugins/10-normalize.wasm")]
    Inspect {
        /// The .wasm file
        file: PathBuf,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Measure a plugin on generated messages, with the host's own runtime
    #[command(after_help = "Example:\n  headworks plugin bench plugins/10-normalize.wasm --messages 1000000")]
    Bench {
        /// The .wasm file
        file: PathBuf,
        /// Config of the plugin, a YAML or JSON file
        #[arg(long, value_name = "FILE")]
        plugin_config: Option<PathBuf>,
        /// Number of messages, in batches of 256
        #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(256..=100_000_000))]
        messages: u64,
        /// Topic of every message
        #[arg(long, default_value = "acme/factory-01/temperature/sensor-4a3b/reading")]
        topic: String,
        /// Payload of every message
        #[arg(long, default_value = r#"{"device_id":"sensor-4a3b","value":21.5,"ts":1700000000}"#)]
        payload: String,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Remove a plugin, so that the pipelines of the folder continue without it
    Remove {
        /// Name of the plugin: the file name without its number and .wasm
        name: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum StreamsCommand {
    /// List the streams and what they hold
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Print messages of a stream
    #[command(
        after_help = "Examples:\n  headworks streams tail -f                  the last 10, then new messages\n  \
        headworks streams tail telemetry --from 10m --format json\n  \
        headworks streams tail --from 2026-11-23T06:00:00Z --max 100"
    )]
    Tail(TailArgs),
}

#[derive(Debug, Args)]
pub struct TailArgs {
    /// The stream [default: the only one that pipelines read, otherwise the one that takes all other topics]
    pub name: Option<String>,
    /// Where to begin: an offset, `start`, `end`, a time, or an age such as 10m
    #[arg(long, value_name = "OFFSET|TIME", value_parser = From::parse)]
    pub from: Option<From>,
    /// Continue with new messages
    #[arg(long, short)]
    pub follow: bool,
    /// End after this many messages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max: Option<u64>,
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub format: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub enum ClientsCommand {
    /// List connected clients and stored sessions, by client id
    List {
        /// Only client ids with this prefix
        prefix: Option<String>,
        /// At most this many [default: 100 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        /// Order: by id, or the largest number first
        #[arg(long, value_enum, default_value = "id")]
        sort: ClientSort,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Show one client with its subscriptions
    Show {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// List clients that were refused since the host started, newest first, with address and reason
    Refused {
        /// At most this many [default: 100 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Disconnect a client; it may connect again at once
    Kick {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Disconnect a client and delete its session, subscriptions and queued messages
    Delete {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClientSort {
    Id,
    /// Messages that the client published
    Published,
    /// Messages that were sent to the client
    Delivered,
    /// Messages that are queued for the client
    Queued,
    /// Messages for the client that it did not receive
    Missed,
    /// Refused publishes and subscriptions of the client
    Refused,
}

#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// Print why messages were rejected: each reason with its count, the most frequent first
    Summary {
        /// Also dead letters that were sent again
        #[arg(long)]
        sent: bool,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// List the rejected messages, newest last
    List {
        /// At most this many, the newest [default: 50 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        /// Also dead letters that were sent again
        #[arg(long)]
        sent: bool,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Show one dead letter with its payload
    Show {
        /// The number at the start of each line of `dead-letters list`
        #[arg(value_parser = letter_id)]
        id: u64,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Send dead letters again. A dead letter of a sink goes to that sink. A dead letter of a step first
    /// runs through the steps that its message has not passed. The host must run
    #[command(
        override_usage = "headworks dead-letters redrive <IDS>...\n       headworks dead-letters redrive --all [OPTIONS]",
        after_help = "Examples:\n  headworks dead-letters redrive 17 18\n  \
        headworks dead-letters redrive --all --sink warehouse"
    )]
    Redrive {
        /// Ids from `dead-letters list`
        #[arg(required_unless_present = "all", conflicts_with = "all", num_args = 1.., value_parser = letter_id)]
        ids: Vec<u64>,
        /// All dead letters that match the other options
        #[arg(long)]
        all: bool,
        /// Also send those that another copy of the data folder may have sent; rows may be duplicated
        #[arg(long)]
        possible_duplicates: bool,
        /// Only dead letters of steps: those whose reason asks for this option start at this step, the
        /// others at the first step that their message has not passed
        #[arg(long, value_name = "STEP")]
        from_step: Option<String>,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Close dead letters without sending them, so that they are no longer a problem; the host must run
    #[command(
        override_usage = "headworks dead-letters discard <IDS>...\n       headworks dead-letters discard --all [OPTIONS]",
        after_help = "The messages stay until retention removes them; `list --sent` shows them.\n\nExamples:\n  \
        headworks dead-letters discard 17 18\n  headworks dead-letters discard --all --step normalize"
    )]
    Discard {
        /// Ids from `dead-letters list`
        #[arg(required_unless_present = "all", conflicts_with = "all", num_args = 1.., value_parser = letter_id)]
        ids: Vec<u64>,
        /// All dead letters that match the other options
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

fn count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "must be a whole number of at least 1".to_owned())
}

fn letter_id(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| "an id is a whole number; `dead-letters list` begins each line with one".to_owned())
}

#[derive(Clone, Debug, Default, Args)]
pub struct LetterFilter {
    /// Only dead letters of this pipeline
    #[arg(long, value_name = "NAME")]
    pub pipeline: Option<String>,
    /// Only messages that this sink rejected
    #[arg(long, value_name = "NAME")]
    pub sink: Option<String>,
    /// Only messages that this step rejected
    #[arg(long, value_name = "NAME")]
    pub step: Option<String>,
}

impl ValueEnum for LogFormat {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Compact, Self::Json]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(match self {
            Self::Compact => "compact",
            Self::Json => "json",
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command as Process;

    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;
    use crate::hints::{Hint, Hints};

    /// The words of a command, as a shell reads it.
    fn words(command: &str) -> Vec<String> {
        let script = format!("printf '%s\\0' {command}");
        let output = Process::new("bash").args(["-c", &script]).output().expect("bash");
        assert!(output.status.success(), "{command}: {output:?}");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.strip_suffix('\0').expect("a word").split('\0').map(str::to_owned).collect()
    }

    #[test]
    fn every_hint_is_a_command_that_runs_as_it_is_shown() {
        let config = Path::new("o'clock/$HOME hw.yaml");
        for name in ["warehouse", "-x", "it's \"$(reboot)\" `x`; \\ &", "a\nb\u{202e}c"] {
            for hint in Hint::samples(name) {
                let command = Hints::of(Some(config)).command(hint);
                let words = words(&command);
                Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{command}: {error}"));
                let takes_config = words.iter().any(|word| word == config.to_str().unwrap());
                let has_option = Cli::try_parse_from(words.iter().chain([&"--config=x".to_owned()])).is_ok();
                assert!(takes_config || !has_option, "{command}: --config is missing");
                let is_of_name = format!("{hint:?}").contains(&format!("{name:?}"));
                assert_eq!(words.iter().any(|word| word == name), is_of_name, "{command}: {words:?}");
            }
        }
    }

    /// Text and comments of a source file up to its tests, with the number of each line.
    fn lines_of(source: &str) -> impl Iterator<Item = (usize, &str)> {
        source.lines().enumerate().take_while(|(_, line)| !line.starts_with("#[cfg(test)]"))
    }

    /// What text calls a command must be one. Text that is shown takes it from `hints`, which adds the config.
    #[test]
    fn commands_in_the_sources_exist_and_those_that_are_shown_are_hints() {
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        let (mut faults, mut checked) = (Vec::new(), 0);
        let made_elsewhere = ["hints.rs", "cli/args.rs", "config/reference.rs"];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() {
                    folders.push(entry);
                    continue;
                }
                let is_test =
                    entry.components().any(|part| part.as_os_str().to_string_lossy().contains("test"));
                if is_test || made_elsewhere.iter().any(|file| entry.ends_with(file)) {
                    continue;
                }
                let source = std::fs::read_to_string(&entry).unwrap();
                for (number, line) in lines_of(&source) {
                    for quote in ['`', '"'] {
                        for (at, start) in line.match_indices(&format!("{quote}headworks ")) {
                            let command = line[at + 1..].split(quote).next().unwrap_or_default();
                            let second = line[at + start.len()..].split([' ', quote]).next();
                            let is_command =
                                Cli::command().find_subcommand(second.unwrap_or_default()).is_some();
                            // `headworks version 0.1.0` of `$SYS`, and the compiler's child.
                            if !is_command && (quote == '"' || command == "headworks plugin-compile") {
                                continue;
                            }
                            checked += 1;
                            let at = format!("{}:{}: {command}", entry.display(), number + 1);
                            if !line.trim_start().starts_with("//") && !line.trim_start().starts_with("help:")
                            {
                                faults.push(format!("{at}: to be made by `hints`"));
                            }
                            let words = command.split(' ').chain(["--help"]);
                            let parsed = Cli::try_parse_from(words).map_err(|error| error.kind());
                            if !matches!(parsed, Err(ErrorKind::DisplayHelp)) {
                                faults.push(format!("{at}: {parsed:?}"));
                            }
                        }
                    }
                }
            }
        }
        assert!(checked > 5 && faults.is_empty(), "{checked} commands\n{}", faults.join("\n"));
    }

    #[test]
    fn every_help_fits_80_columns() {
        fn check(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
            command.get_subcommands_mut().for_each(check);
        }
        let mut command = Cli::command();
        command.build();
        check(&mut command);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_value_is_told_with_what_is_right() {
        for (line, wanted) in [
            ("streams tail --from yesterday", "must be an offset, `start`, `end`, a time"),
            ("streams tail --max 0", "0 is not in 1.."),
            ("clients list --max 0", "at least 1"),
            ("clients refused --max 0", "at least 1"),
            ("dead-letters list --max 0", "at least 1"),
            ("dead-letters show x", "an id is a whole number"),
        ] {
            let words = std::iter::once("headworks").chain(line.split(' '));
            let error = Cli::try_parse_from(words).unwrap_err();
            assert!(
                error.kind() == ErrorKind::ValueValidation && error.to_string().contains(wanted),
                "{error}"
            );
        }
    }

    #[test]
    fn commands_parse_as_documented() {
        for line in [
            "run",
            "run --config a.yaml --log debug --log-format json",
            "validate -c a.yaml --format json",
            "validate --connect",
            "plugin list",
            "plugin new check-limits --sdk guest-sdk",
            "plugin inspect a.wasm --format json",
            "plugin bench a.wasm --messages 1000",
            "plugin remove normalize",
            "streams list",
            "clients list edge- --sort missed --max 5",
            "streams tail",
            "streams tail telemetry --from 10m --follow --max 5",
            "dead-letters list --max 5 --sink warehouse",
            "dead-letters show 17",
            "dead-letters redrive 17 18",
            "dead-letters redrive --all --pipeline telemetry",
            "dead-letters redrive --all --step check --from-step normalize",
            "dead-letters discard 17 18",
            "dead-letters discard --all --step normalize",
            "schema",
            "passwd passwords ann",
            "passwd passwords ann --delete",
            "passwd passwords ann --scram --scram-iterations 15000",
        ] {
            let words = std::iter::once("headworks").chain(line.split(' '));
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_would_do_nothing_or_two_things_is_refused() {
        for line in [
            "dead-letters redrive",
            "dead-letters redrive --all 17",
            "dead-letters show x",
            "dead-letters list --max 0",
            "passwd passwords ann --scram-iterations 15000",
            "passwd passwords ann --scram --scram-iterations 4095",
            "passwd passwords ann --scram --delete",
            "",
        ] {
            let words = std::iter::once("headworks").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
