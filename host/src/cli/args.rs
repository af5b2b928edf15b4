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
    about = "Takes device messages in by MQTT, runs them through WebAssembly plugins, writes rows to databases",
    arg_required_else_help = true,
    max_term_width = 80,
    after_help = "Start here:\n  headworks run                      MQTT on 127.0.0.1:1883, rows in ./data/telemetry.db\n  \
        headworks run --config hw.yaml     your own config\n  \
        headworks validate --config hw.yaml\n  \
        headworks status                   what is wrong, and what to do"
)]
pub struct Cli {
    /// What to log to stderr: a level, or target=level, comma-separated [default: RUST_LOG, else info]
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    /// Logs for a person or for a machine
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
        everything in ./data, rows in the table `telemetry` of ./data/telemetry.db.")]
    Run(ConfigArgs),
    /// Check a config: every problem at once with file and line, or what would run
    #[command(
        after_help = "Exit codes: 0 valid, 1 a sink would not write (--connect), 2 the config is wrong.\n\n\
        Examples:\n  headworks validate --config headworks.yaml\n  \
        headworks validate --config headworks.yaml --connect"
    )]
    Validate(ValidateArgs),
    /// What is wrong with the running host and what to do; exit code 0 fine, 1 a problem or no answer, 3 not running
    Status(StatusArgs),
    /// Plugins: new, list, inspect, bench, remove
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Look into streams; works while the host runs
    #[command(subcommand)]
    Streams(StreamsCommand),
    /// Refused messages: summary, list, show, send again, discard
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// MQTT clients: list, show, refused, kick, delete; the host must run
    #[command(subcommand)]
    Clients(ClientsCommand),
    /// Add or change a user of a password file, or take one out
    #[command(
        after_help = "The password is read from the terminal, twice and without showing it, or else is the first\n\
        line of stdin. The host takes the changed file in by itself.\n\nExamples:\n  \
        headworks passwd passwords ann\n  headworks passwd passwords ann --delete\n  headworks passwd passwords ann --scram"
    )]
    Passwd(PasswdArgs),
    /// Print the JSON Schema of the config, for editors
    Schema,
}

#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// A YAML file, or a folder of them [default: the embedded config]
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct PasswdArgs {
    /// The password file; made when there is none
    pub file: PathBuf,
    /// Whose password
    pub user: String,
    /// Take the user out
    #[arg(long)]
    pub delete: bool,
    /// Let the user log in by SCRAM-SHA-256 too (MQTT 5)
    #[arg(long, conflicts_with = "delete")]
    pub scram: bool,
    /// What each login costs the client [default: 600000]
    #[arg(long, value_name = "N", requires = "scram", value_parser = clap::value_parser!(u32).range(i64::from(ITERATIONS_MIN)..=i64::from(ITERATIONS_MAX)))]
    pub scram_iterations: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct ValidateArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Also try every sink: connect, log in, hold the table against the config; writes nothing
    ///
    /// A server that does not answer is given up after `connect_timeout` of its sink (10 s by default)
    /// for each host of its url, and once more if it answers to the login and then no longer. All sinks
    /// are tried at the same time. The exit code is 1 where one would not write.
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
    /// Make a folder with a plugin to begin with, in Rust
    #[command(after_help = "Example:\n  headworks plugin new check-limits --sdk headworks/guest-sdk")]
    New {
        /// The folder to make; its name is the plugin's
        name: PathBuf,
        /// Folder of the SDK: `guest-sdk` of Headworks' sources
        #[arg(long, value_name = "DIR")]
        sdk: PathBuf,
    },
    /// The plugins of the folder, in the order they run
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// What a plugin file is: name, version, imports granted and denied, or why it cannot run
    #[command(after_help = "Example:\n  headworks plugin inspect plugins/10-normalize.wasm")]
    Inspect {
        /// The .wasm file
        file: PathBuf,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Measure a plugin on made-up messages, through the host's real path
    #[command(after_help = "Example:\n  headworks plugin bench plugins/10-normalize.wasm --messages 1000000")]
    Bench {
        /// The .wasm file
        file: PathBuf,
        /// Config handed to the plugin, a YAML or JSON file
        #[arg(long, value_name = "FILE")]
        plugin_config: Option<PathBuf>,
        /// Messages to run, in batches of 256
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
    /// Take a plugin out for good, so that pipelines of the folder go on without it
    Remove {
        /// Its name: the file's without number and .wasm
        name: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum StreamsCommand {
    /// The streams with what they hold
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Messages of a stream
    #[command(
        after_help = "Examples:\n  headworks streams tail -f                  the last 10, then what comes\n  \
        headworks streams tail telemetry --from 10m --format json\n  \
        headworks streams tail --from 2026-11-23T06:00:00Z --max 100"
    )]
    Tail(TailArgs),
}

#[derive(Debug, Args)]
pub struct TailArgs {
    /// The stream [default: the only one that pipelines read, else the one that takes all other topics]
    pub name: Option<String>,
    /// Where to begin: an offset, `start`, `end`, a time, or how long ago such as 10m
    #[arg(long, value_name = "OFFSET|TIME", value_parser = From::parse)]
    pub from: Option<From>,
    /// Go on with what comes
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
    /// Who is connected, and whose session waits, by client id
    List {
        /// Only ids that begin with this
        prefix: Option<String>,
        /// At most this many [default: 100 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        /// Which come first: by id, or those with the most of it
        #[arg(long, value_enum, default_value = "id")]
        sort: ClientSort,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Everything about one of them, its subscriptions too
    Show {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Clients that were refused since the host started, newest first: which, from where, why
    Refused {
        /// At most this many [default: 100 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// End a client's connection; it may come back at once
    Kick {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Delete a client's session, its subscriptions and all that waits for it; ends its connection
    Delete {
        client_id: String,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClientSort {
    Id,
    /// Messages that came from the client
    Published,
    /// Messages that were sent to it
    Delivered,
    /// Messages that wait for it
    Queued,
    /// Messages for it that it did not get
    Missed,
    /// Its publishes and subscriptions that were refused
    Refused,
}

#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// Why messages were refused: each reason with its count, the most frequent first
    Summary {
        /// Also those that were sent again
        #[arg(long)]
        sent: bool,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Each refused message, newest last
    List {
        /// At most this many, the newest [default: 50 as text, all as JSON]
        #[arg(long, value_name = "N", value_parser = count)]
        max: Option<NonZeroUsize>,
        /// Also those that were sent again
        #[arg(long)]
        sent: bool,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Everything about one of them, its payload too
    Show {
        /// The number that `dead-letters list` begins each one with
        #[arg(value_parser = letter_id)]
        id: u64,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Send them again: to the sink that refused them, or through the steps that they have not been
    /// through, from the one that refused them on, to the sinks that they are for; the host must run
    #[command(
        override_usage = "headworks dead-letters redrive <IDS>...\n       headworks dead-letters redrive --all [OPTIONS]",
        after_help = "Examples:\n  headworks dead-letters redrive 17 18\n  \
        headworks dead-letters redrive --all --sink warehouse"
    )]
    Redrive {
        /// Ids from `dead-letters list`
        #[arg(required_unless_present = "all", conflicts_with = "all", num_args = 1.., value_parser = letter_id)]
        ids: Vec<u64>,
        /// All that the other options leave
        #[arg(long)]
        all: bool,
        /// Also those that another copy of the data folder may have sent: rows may come twice
        #[arg(long)]
        possible_duplicates: bool,
        /// Letters of steps only: those whose reason asks for this option enter at this step, the others
        /// at the first step that they have not been through
        #[arg(long, value_name = "STEP")]
        from_step: Option<String>,
        #[command(flatten)]
        filter: LetterFilter,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Close those that nobody will send again: they are no problem any more; the host must run
    #[command(
        override_usage = "headworks dead-letters discard <IDS>...\n       headworks dead-letters discard --all [OPTIONS]",
        after_help = "Their messages stay until retention removes them; `list --sent` shows them.\n\nExamples:\n  \
        headworks dead-letters discard 17 18\n  headworks dead-letters discard --all --step normalize"
    )]
    Discard {
        /// Ids from `dead-letters list`
        #[arg(required_unless_present = "all", conflicts_with = "all", num_args = 1.., value_parser = letter_id)]
        ids: Vec<u64>,
        /// All that the other options leave
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
    /// Only those of this pipeline
    #[arg(long, value_name = "NAME")]
    pub pipeline: Option<String>,
    /// Only those that this sink refused
    #[arg(long, value_name = "NAME")]
    pub sink: Option<String>,
    /// Only those that this step refused
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
