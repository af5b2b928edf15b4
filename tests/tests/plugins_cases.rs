//! The standard plugins' case files through the host's own runtime: on the
//! .wasm files in the tree and on a fresh build.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use headworks::batch::{Batch, Entry, Offset, Partition, Span, flags};
use headworks::devices::{self, Devices};
use headworks::plugin::{Error, Limits, Runner};
use headworks::step::{Attempt, RefusedKind, Step};
use headworks::topic::Namespace;
use headworks_guest::cases::{Became, Case, Sent};
use headworks_tests::folder::root;
use headworks_tests::host::{fresh, prebuilt};
use headworks_tests::process::run;

const PLUGINS: [&str; 3] = ["normalize", "enrich", "route"];

#[test]
fn prebuilt_plugins_pass_their_cases() {
    for name in PLUGINS {
        check(name, &prebuilt(name));
    }
}

#[test]
fn freshly_built_plugins_pass_the_same_cases() {
    for name in PLUGINS {
        check(name, &fresh(name));
    }
}

#[test]
fn prebuilt_is_fresh() {
    run(Command::new(root().join("plugins/build.sh")).arg("--check-stale"));
}

fn check(name: &str, wasm: &Path) {
    let bytes = std::fs::read(wasm).unwrap_or_else(|error| panic!("{}: {error}", wasm.display()));
    let cases = Case::read_folder(&root().join("plugins").join(name).join("cases"));
    assert!(!cases.is_empty(), "{name} has no cases");
    for (file, case) in cases {
        check_case(&format!("{name}/{file}"), &case, &bytes);
    }
}

fn check_case(file: &str, case: &Case, wasm: &[u8]) {
    let table = devices::Config { file: None, table: case.devices.clone() };
    let devices = Arc::new(Devices::load(&table).expect("a table"));
    let namespace = Arc::new(Namespace::parse(&case.namespace).expect("a namespace"));
    let config = serde_json::from_str(&case.config_text()).expect("JSON");
    let runner = Runner::from_bytes(wasm, &config, Limits::default(), devices, namespace);
    let mut runner = match runner {
        Ok(runner) => runner,
        Err(Error::Config(text)) => {
            assert!(!case.problems.is_empty(), "{file}: {}: {text}", case.about);
            for problem in &case.problems {
                assert!(
                    text.contains(&problem.reason),
                    "{file}: {}: {:?} is not in {text}",
                    case.about,
                    problem.reason
                );
            }
            return;
        }
        Err(error) => panic!("{file}: {error}"),
    };
    assert!(case.problems.is_empty(), "{file}: {}: its config was accepted", case.about);
    let batch = batch_of(case);
    let outcome = runner.run(batch.clone(), Partition(0), Attempt::FIRST);
    let became: Vec<Became> = (0..batch.len())
        .map(|i| {
            if let Some(refused) = outcome.refused.iter().find(|refused| refused.index as usize == i) {
                assert_eq!(refused.kind, RefusedKind::Failed, "{file}: {}", refused.reason);
                return Became::Failed(refused.reason.clone());
            }
            if let Some(reason) = &outcome.retry {
                return Became::Retried(reason.clone());
            }
            let source = batch.entries[i].offset;
            let sent: Vec<Sent> =
                outcome.passed.messages().filter(|m| m.entry.offset == source).map(sent).collect();
            if sent.is_empty() { Became::Dropped } else { Became::Sent(sent) }
        })
        .collect();
    case.check(file, &became);
}

fn batch_of(case: &Case) -> Batch {
    let mut bytes = Vec::new();
    let mut span = |part: &[u8]| {
        let begin = bytes.len();
        bytes.extend_from_slice(part);
        Span::new(0, begin, part.len())
    };
    let entries = case
        .messages
        .iter()
        .enumerate()
        .map(|(i, message)| {
            let (source, fits) = case.source(message);
            Entry {
                flags: if fits { flags::FITS_NAMESPACE } else { 0 }
                    | if source.event_us.is_some() { flags::EVENT_TIME } else { 0 },
                offset: i as u32,
                received_us: case.now_us,
                event_us: source.event_us.unwrap_or(0),
                topic: span(source.topic.as_bytes()),
                payload: span(&source.payload),
                route: span(source.route.as_bytes()),
                device: span(source.device.as_bytes()),
                ..Entry::default()
            }
        })
        .collect();
    Batch {
        base: Offset(0),
        now_us: case.now_us,
        segments: vec![Bytes::from(bytes)],
        entries,
        exclusive: true,
    }
}

fn sent(message: headworks::batch::MessageRef<'_>) -> Sent {
    Sent {
        topic: message.topic().to_owned(),
        payload: message.payload().to_vec(),
        device: message.device().to_owned(),
        route: message.route().to_owned(),
        event_us: message.event_us(),
    }
}
