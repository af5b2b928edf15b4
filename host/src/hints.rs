//! Commands that the log, an error or `headworks status` tells a person to run.
//!
//! Each is whole: it names the config of the host that it is about, and its arguments are quoted for
//! a shell, so that it runs as it is shown in the folder in which the host was started. A test of
//! `cli::args` parses each of them, and finds commands in the sources that are not made here.

use std::path::Path;
use std::sync::Arc;

use crate::telemetry::is_printable;

/// A command of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint<'h> {
    Run,
    Status,
    Validate,
    /// Adds a user, whom the reader names, to a password file.
    Passwd(&'h Path),
    PluginList,
    PluginInspect(&'h Path),
    PluginRemove(&'h str),
    StreamsTail,
    ClientsList,
    /// Those that published the most messages first.
    ClientsPublished,
    /// Those that missed the most messages first.
    ClientsMissed,
    /// Those with the longest queues first.
    ClientsQueued,
    /// Those whose publishes and subscriptions were refused most first.
    ClientsDenied,
    ClientsShow(&'h str),
    /// Those that were refused, the newest first.
    ClientsRefused,
    DeadLettersList,
    DeadLettersSummary(Letters<'h>),
    Redrive(Letters<'h>),
    /// Sends also those that another copy of the data folder may have sent.
    RedrivePossibleDuplicates,
    Discard(Letters<'h>),
}

/// Which dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Letters<'h> {
    All,
    OfPipeline(&'h str),
    OfSink(&'h str),
}

/// Makes commands about one host.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    /// As the command line of the host named it; `None`: the embedded config.
    config: Option<Arc<Path>>,
}

impl Hints {
    pub fn of(config: Option<&Path>) -> Self {
        Self { config: config.map(Into::into) }
    }

    /// The command as a person types it.
    pub fn command(&self, hint: Hint<'_>) -> String {
        let (words, argument) = hint.words();
        let mut command = format!("headworks {words}");
        // Else a name that begins so is taken for an option: it stands last, behind `--`.
        let (last, argument) = argument.into_iter().partition::<Vec<_>, _>(|name| name.starts_with('-'));
        for argument in &argument {
            command += &format!(" {}", quoted(argument));
        }
        if let Some((option, value)) = hint.options() {
            command += &format!(" {option} {}", quoted(value));
        }
        if let Some(config) = self.config.as_deref().filter(|_| hint.takes_config()) {
            command += &format!(" --config {}", quoted(&config.to_string_lossy()));
        }
        for argument in &last {
            command += &format!(" -- {}", quoted(argument));
        }
        if matches!(hint, Hint::Passwd(_)) {
            command += " USER";
        }
        command
    }
}

impl<'h> Hint<'h> {
    /// The words of the command, and what stands at its end.
    fn words(self) -> (&'static str, Option<String>) {
        let path = |path: &Path| Some(path.to_string_lossy().into_owned());
        match self {
            Self::Run => ("run", None),
            Self::Status => ("status", None),
            Self::Validate => ("validate", None),
            Self::Passwd(file) => ("passwd", path(file)),
            Self::PluginList => ("plugin list", None),
            Self::PluginInspect(file) => ("plugin inspect", path(file)),
            Self::PluginRemove(name) => ("plugin remove", Some(name.to_owned())),
            Self::StreamsTail => ("streams tail --follow", None),
            Self::ClientsList => ("clients list", None),
            Self::ClientsPublished => ("clients list --sort published", None),
            Self::ClientsMissed => ("clients list --sort missed", None),
            Self::ClientsQueued => ("clients list --sort queued", None),
            Self::ClientsDenied => ("clients list --sort refused", None),
            Self::ClientsShow(client_id) => ("clients show", Some(client_id.to_owned())),
            Self::ClientsRefused => ("clients refused", None),
            Self::DeadLettersList => ("dead-letters list", None),
            Self::DeadLettersSummary(_) => ("dead-letters summary", None),
            Self::Redrive(_) => ("dead-letters redrive --all", None),
            Self::RedrivePossibleDuplicates => ("dead-letters redrive --all --possible-duplicates", None),
            Self::Discard(_) => ("dead-letters discard --all", None),
        }
    }

    fn options(self) -> Option<(&'static str, &'h str)> {
        let (Self::DeadLettersSummary(letters) | Self::Redrive(letters) | Self::Discard(letters)) = self
        else {
            return None;
        };
        match letters {
            Letters::All => None,
            Letters::OfPipeline(name) => Some(("--pipeline", name)),
            Letters::OfSink(name) => Some(("--sink", name)),
        }
    }

    fn takes_config(self) -> bool {
        !matches!(self, Self::PluginInspect(_) | Self::Passwd(_))
    }

    /// One of each kind, for tests. `name` may be anything, unlike the names of a config.
    #[cfg(test)]
    pub fn samples(name: &'h str) -> Vec<Self> {
        let mut samples = Vec::new();
        let mut next = Some(Self::Run);
        while let Some(hint) = next {
            samples.push(hint);
            next = match hint {
                Self::Run => Some(Self::Status),
                Self::Status => Some(Self::Validate),
                Self::Validate => Some(Self::Passwd(Path::new(name))),
                Self::Passwd(_) => Some(Self::PluginList),
                Self::PluginList => Some(Self::PluginInspect(Path::new(name))),
                Self::PluginInspect(_) => Some(Self::PluginRemove(name)),
                Self::PluginRemove(_) => Some(Self::StreamsTail),
                Self::StreamsTail => Some(Self::ClientsList),
                Self::ClientsList => Some(Self::ClientsPublished),
                Self::ClientsPublished => Some(Self::ClientsMissed),
                Self::ClientsMissed => Some(Self::ClientsQueued),
                Self::ClientsQueued => Some(Self::ClientsDenied),
                Self::ClientsDenied => Some(Self::ClientsShow(name)),
                Self::ClientsShow(_) => Some(Self::ClientsRefused),
                Self::ClientsRefused => Some(Self::DeadLettersList),
                Self::DeadLettersList => Some(Self::DeadLettersSummary(Letters::All)),
                Self::DeadLettersSummary(Letters::All) => {
                    Some(Self::DeadLettersSummary(Letters::OfPipeline("telemetry")))
                }
                Self::DeadLettersSummary(_) => Some(Self::Redrive(Letters::OfSink("warehouse"))),
                Self::Redrive(_) => Some(Self::RedrivePossibleDuplicates),
                Self::RedrivePossibleDuplicates => Some(Self::Discard(Letters::OfPipeline("telemetry"))),
                Self::Discard(_) => None,
            };
        }
        samples
    }
}

/// A word for a shell. One that a terminal would not show as it is comes as bash's `$'...'`.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    if word.chars().all(is_printable) {
        return format!("'{}'", word.replace('\'', r"'\''"));
    }
    let escaped = word.chars().map(|c| match c {
        '\'' | '\\' => format!("\\{c}"),
        c if is_printable(c) => c.to_string(),
        c => format!("\\U{:08x}", u32::from(c)),
    });
    format!("$'{}'", escaped.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_its_config_and_quotes_what_a_shell_would_read_otherwise() {
        let hints = Hints::of(Some(Path::new("my site/hw.yaml")));
        let shown = |hint| hints.command(hint);
        assert_eq!(shown(Hint::Status), "headworks status --config 'my site/hw.yaml'");
        let id = "it's $(reboot)";
        assert_eq!(
            shown(Hint::ClientsShow(id)),
            r"headworks clients show 'it'\''s $(reboot)' --config 'my site/hw.yaml'"
        );
        assert_eq!(shown(Hint::PluginInspect(Path::new("a.wasm"))), "headworks plugin inspect a.wasm");
        assert_eq!(shown(Hint::ClientsShow("-x")), "headworks clients show --config 'my site/hw.yaml' -- -x");
        let here = Hints::default();
        assert_eq!(here.command(Hint::ClientsShow("-x")), "headworks clients show -- -x");
        assert_eq!(
            here.command(Hint::ClientsShow("a\u{202e}'b")),
            r"headworks clients show $'a\U0000202e\'b'"
        );
        assert_eq!(
            here.command(Hint::DeadLettersSummary(Letters::OfSink("w"))),
            "headworks dead-letters summary --sink w"
        );
    }
}
