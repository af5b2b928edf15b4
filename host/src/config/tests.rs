use std::path::PathBuf;

use serde_json::json;

use super::*;

fn parse_files(texts: &[(&str, &str)]) -> Result<(Config, Vec<String>), Error> {
    let texts = texts.iter().map(|(name, text)| (PathBuf::from(name), (*text).to_owned()));
    let files = files::merge(texts.collect())?;
    parse(&files).into_loaded(None, &files).map(|loaded| (loaded.config, loaded.warnings))
}

fn parse_text(text: &str) -> Result<(Config, Vec<String>), Error> {
    parse_files(&[("headworks.yaml", text)])
}

fn problems(text: &str) -> Vec<String> {
    match parse_text(text) {
        Err(Error::Invalid(problems)) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("expected problems, got {other:?}"),
    }
}

#[test]
fn no_config_is_the_embedded_default() {
    let Loaded { config, source, warnings } = load(None).unwrap();
    assert_eq!(source.to_string(), "embedded default");
    assert_eq!(warnings, [""; 0]);
    assert_eq!(config.data_dir, PathBuf::from("data"));
    assert_eq!(config.streams.keys().collect::<Vec<_>>(), ["default", "telemetry"]);
    assert_eq!(config.streams["telemetry"].partitions, 4);
    assert_eq!(config.streams["telemetry"].topics, ["+/+/+/+/+"]);
    assert_eq!((config.default_stream(), config.main_stream()), ("default", "telemetry"));
    assert_eq!(config.pipelines.len(), 1);
    let pipeline = &config.pipelines["telemetry"];
    assert_eq!((pipeline.from.as_str(), pipeline.steps.is_none()), ("telemetry", true));
    assert_eq!(pipeline.routes["default"].sinks(), ["telemetry"]);
    let sink = serde_json::to_value(&config.sinks["telemetry"]).unwrap();
    assert_eq!(
        (&sink["type"], &sink["path"], &sink["table"]),
        (&json!("sqlite"), &json!("data/telemetry.db"), &json!("telemetry"))
    );
    assert_eq!(config.mqtt.listeners[0].bind.to_string(), "127.0.0.1:1883");
    assert_eq!(config.admin.bind, "127.0.0.1:8080");
}

#[test]
fn five_errors_give_five_lines_with_file_line_and_key() {
    let lines = problems(
        "\
data_dir: ./data
mqtt:
  listeners:
    - bind: 127.0.0.1:1883
      allow_anonymus: true
streams:
  telemetry:
    partitions: four
    retention: { max_age: 7 parsecs }
pipelines:
  telemetry:
    from: telemetry
    routes: { default: warehose }
sinks:
  warehouse:
    type: postgres
    url: postgres://writer@127.0.0.1/iot
    table: telemetry
    batch: { rows_max: 0 }
",
    );
    assert_eq!(
        lines,
        [
            "headworks.yaml:5: mqtt.listeners[0].allow_anonymus: unknown key, did you mean `allow_anonymous`?",
            "headworks.yaml:8: streams.telemetry.partitions: must be a whole number, is \"four\"",
            "headworks.yaml:9: streams.telemetry.retention.max_age: must be a time such as 300ms, 5s or 7d, is \"7 parsecs\"",
            "headworks.yaml:13: pipelines.telemetry.routes.default: no sink `warehose`, did you mean `warehouse`?",
            "headworks.yaml:19: sinks.warehouse.batch.rows_max: must be between 1 and 100000, is 0",
        ]
    );
}

#[test]
fn a_packet_must_fit_into_one_commit_of_its_stream() {
    let lines = problems("mqtt: { max_packet_size: 16MiB }\nstreams: { telemetry: { partitions: 1 } }\n");
    assert_eq!(
        lines,
        ["headworks.yaml:2: streams.telemetry.commit_buffer_bytes_max: must be at least 33.0 MiB, twice \
          mqtt.max_packet_size (16.0 MiB) and 1 MiB, is 16.0 MiB; a packet must fit into one commit"]
    );
}

#[test]
fn a_folder_is_merged_and_a_key_in_two_files_names_both() {
    let (config, _) =
        parse_files(&[("a.yaml", "data_dir: /x\n"), ("b.yaml", "admin: { bind: 127.0.0.1:1 }\n")]).unwrap();
    assert_eq!((config.data_dir, config.admin.bind.as_str()), ("/x".into(), "127.0.0.1:1"));

    let error = parse_files(&[
        ("c/a.yaml", "admin:\n  bind: 127.0.0.1:1\n"),
        ("c/b.yaml", "# more\nadmin:\n  bond: 127.0.0.1:2\ntopics: x\n"),
    ]);
    assert_eq!(
        error.unwrap_err().to_string(),
        "c/a.yaml:1: admin: is in two files, c/a.yaml:1 and c/b.yaml:2\n\
         c/b.yaml:4: topics: level `x` must be a field name in braces, such as {site}"
    );
}

#[test]
fn a_folder_is_read_in_the_order_of_names_without_hidden_files() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("b.yaml"), "data_dir: /b\n").unwrap();
    std::fs::write(dir.path().join("a.yml"), "plugins: { dir: /p }\n").unwrap();
    std::fs::write(dir.path().join(".c.yaml"), "nonsense: 1\n").unwrap();
    std::fs::write(dir.path().join("readme.txt"), "nonsense: 1\n").unwrap();
    let loaded = load(Some(dir.path())).unwrap();
    assert_eq!(loaded.config.data_dir, PathBuf::from("/b"));
    assert_eq!(loaded.source.files, [dir.path().join("a.yml"), dir.path().join("b.yaml")]);
    let empty = tempfile::tempdir().unwrap();
    assert!(load(Some(empty.path())).unwrap_err().to_string().contains("no .yaml file"));
    assert!(load(Some(&dir.path().join("none.yaml"))).unwrap_err().to_string().contains("none.yaml"));
}

#[test]
fn broken_yaml_in_every_file_is_said_with_its_line() {
    let error = parse_files(&[("a.yaml", "x: [1\ny: 2"), ("b.yaml", "- 1\n")]).unwrap_err().to_string();
    let lines: Vec<_> = error.lines().collect();
    assert!(lines[0].starts_with("a.yaml:2: not YAML: "), "{error}");
    assert_eq!(lines[1], "b.yaml:1: must be a mapping (`key: value`) at the top");
}

#[test]
fn an_empty_file_is_said_and_one_that_is_not_utf8_has_a_line() {
    let (_, warnings) = parse_files(&[("a.yaml", "# nothing\n"), ("b.yaml", "data_dir: data\n")]).unwrap();
    assert_eq!(warnings, ["a.yaml: has no key, so that everything has its default"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headworks.yaml");
    std::fs::write(&file, b"data_dir: data\ntopics: \"M\xfcnchen\"\n").unwrap();
    let error = load(Some(&file)).unwrap_err().to_string();
    assert_eq!(error, format!("{}:2: is not UTF-8: byte 0xfc; save the file as UTF-8", file.display()));
}

#[test]
fn anchors_have_a_place_and_merge_keys_are_refused_by_name() {
    let text = "x-sink: &sink { type: sqlite, path: a.db }\nsinks: { a: *sink }\n";
    assert!(parse_text(text).unwrap().0.sinks.contains_key("a"));
    let error = parse_text("x-sink: &sink { type: sqlite }\nsinks:\n  a:\n    <<: *sink\n").unwrap_err();
    assert!(error.to_string().starts_with("headworks.yaml:4: merge keys are not YAML 1.2"), "{error}");
}

#[test]
fn keys_given_twice_and_other_problems_come_together() {
    assert_eq!(
        problems("data_dir: a\ndata_dir: b\nadmin: { bnd: x }\n"),
        [
            "headworks.yaml:1: data_dir: is given twice, here and on line 2",
            "headworks.yaml:3: admin.bind: must be an address and port such as 127.0.0.1:8080, is \"x\"",
            "headworks.yaml:3: admin.bnd: unknown key, did you mean `bind`?",
        ]
    );
}

#[test]
fn a_broker_alone_has_no_sink_and_says_nothing() {
    let drops = "pipelines: { telemetry: { routes: { default: drop } } }\n";
    let (config, warnings) = parse_text(drops).unwrap();
    assert_eq!((warnings.len(), config.sinks.len()), (0, 0));
    assert!(config.pipelines["telemetry"].sinks().is_empty());
    // The default sink is there for whoever names it.
    let one = "pipelines: { telemetry: { routes: { default: drop, alert: telemetry } } }\n";
    assert_eq!(parse_text(one).unwrap().0.sinks.len(), 1);
}

#[test]
fn what_is_left_out_follows_from_what_is_there() {
    let (config, _) = parse_text("mqtt:\nadmin: { bind: 127.0.0.1:0 }\ndata_dir: /srv/hw\n").unwrap();
    assert_eq!(serde_json::to_value(&config.sinks["telemetry"]).unwrap()["path"], "/srv/hw/telemetry.db");

    let (config, _) = parse_text("sinks: { rows: { type: sqlite, path: x.db, table: t } }\n").unwrap();
    assert_eq!(config.pipelines["telemetry"].routes["default"].sinks(), ["rows"]);

    let (config, _) = parse_text("streams: { a: { topics: [a/#] }, b: { topics: [b/#] } }\n").unwrap();
    assert_eq!(config.pipelines.keys().collect::<Vec<_>>(), ["a", "b", "default"]);
    assert_eq!(config.default_stream(), "default");
    assert_eq!(config.pipelines["b"].from, "b");

    let (config, warnings) = parse_text("streams: { a: { topics: [a/#] } }\npipelines: { p: {} }\n").unwrap();
    assert_eq!(config.pipelines["p"].from, "a");
    assert_eq!(warnings, [""; 0], "a broker without pipelines is a choice");
}

#[test]
fn where_the_only_one_is_one_of_several_the_user_must_say() {
    let lines = problems(
        "streams: { a: { topics: [a/#] }, b: {} }
sinks:
  x: { type: sqlite, path: x.db, table: t }
  y: { type: sqlite, path: y.db, table: t }
pipelines:
  p: {}
",
    );
    assert_eq!(
        lines,
        [
            "headworks.yaml:6: pipelines.p.from: is missing, must name a stream: one of a, b",
            "headworks.yaml:6: pipelines.p.routes.default: is missing, must name a sink, since there are several: one of x, y",
        ]
    );
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let lines = problems(
        "mqtt: { listeners: [{ bind: '0.0.0.0:8080', allow_anonymous: true }] }
streams:
  a: { topics: [x/+/y] }
  b: { topics: [x/z/#] }
  dead-letters: {}
  rest: {}
pipelines:
  p: { from: b, steps: [{ plugin: normalize }, { plugin: normalize }, {}] }
sinks: { 'my table': { type: sqlite, path: x.db, table: t } }
",
    );
    let expected = [
        "headworks.yaml:4: streams.b.topics[0]: `x/z/#` overlaps `x/+/y` of stream `a`: every topic belongs to one stream",
        "headworks.yaml:5: streams.dead-letters: is the name of the stream of refused messages, take another",
        "headworks.yaml:6: streams.rest.topics: must be set: stream `dead-letters` takes the topics that no stream names already",
        "headworks.yaml:8: pipelines.p.steps[1]: step 0 is `normalize` already, tell them apart with `as: normalize-2`",
        "headworks.yaml:8: pipelines.p.steps[2].plugin: is missing",
        "headworks.yaml:9: sinks.my table: a name has 1 to 64 letters, digits, `-` and `_`, a letter or digit first, is \"my table\"",
    ];
    for line in expected {
        assert!(lines.iter().any(|known| known == line), "{line}\nnot in {lines:#?}");
    }
    let clash = lines.iter().find(|line| line.contains("is taken by"));
    assert!(clash.is_some_and(|line| line.contains("mqtt.listeners[0].bind (0.0.0.0:8080)")), "{lines:#?}");
}

#[test]
fn two_listeners_on_one_address_are_one_problem() {
    for bind in ["127.0.0.1:1883", "'unix:/run/mqtt.sock'"] {
        let lines =
            problems(&format!("mqtt:\n  listeners:\n    - {{ bind: {bind} }}\n    - {{ bind: {bind} }}\n"));
        let address = bind.trim_matches('\'');
        assert_eq!(
            lines,
            [format!(
                "headworks.yaml:4: mqtt.listeners[1].bind: {address} is taken by mqtt.listeners[0].bind ({address})"
            )]
        );
    }
}

#[test]
fn the_examples_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut count = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let loaded = load(Some(&path)).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(loaded.warnings, [""; 0], "{}", path.display());
            count += 1;
        }
    }
    assert!(count >= 2, "no examples in {}", folder.display());
}

#[test]
fn the_schema_allows_what_the_host_writes_itself() {
    let config = serde_json::to_value(load(None).unwrap().config).unwrap();
    let checked = check::check(&schema(), &config);
    assert_eq!(checked.problems, []);
}

#[test]
fn a_stream_that_was_made_with_other_partitions_is_refused_before_a_host_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let (file, data_dir) = (folder.path().join("headworks.yaml"), folder.path().join("data"));
    let load = |partitions: u16| {
        let text = format!(
            "data_dir: {}\nplugins: {{ dir: {} }}\nstreams:\n  telemetry: {{ partitions: {partitions} }}\n",
            data_dir.display(),
            folder.path().display()
        );
        std::fs::write(&file, text).unwrap();
        load_with_files(Some(&file)).map(|loaded| loaded.config)
    };
    let config = load(2).unwrap();
    let disk = Arc::new(stream::log::RealDisk::default());
    let dir = config.stream_dir("telemetry");
    drop(stream::log::Log::open(disk, &dir, "telemetry", &config.streams["telemetry"]).unwrap());
    load(2).unwrap();
    let error = load(3).unwrap_err().to_string();
    assert!(error.contains(":4: streams.telemetry.partitions: the stream was made with 2, is 3"), "{error}");
}

#[test]
fn a_plugins_folder_that_is_named_and_not_there_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headworks.yaml");
    let warnings = |text: &str| {
        std::fs::write(&file, format!("data_dir: {}\n{text}", folder.path().join("data").display())).unwrap();
        load_with_files(Some(&file)).unwrap().warnings
    };
    let (missing, there) = (folder.path().join("plugin"), folder.path().join("plugins"));
    std::fs::create_dir(&there).unwrap();
    let named = |dir: &Path| format!("plugins: {{ dir: {} }}\n", dir.display());
    let said = warnings(&named(&missing));
    assert!(said.len() == 1 && said[0].starts_with("plugins.dir: there is no folder"), "{said:?}");
    assert_eq!(warnings(&named(&there)), [""; 0]);
    let steps = "pipelines: { telemetry: { steps: [] } }\n";
    assert_eq!(warnings(&(named(&missing) + steps)), [""; 0], "no step is missing");
}

const DERIVED: &str = "streams: { clean: { topic_prefix: clean }, hourly: {} }
sinks: { rows: { type: sqlite, path: x.db, table: t } }
pipelines:
  telemetry: { to: clean }
  hourly: { from: clean, to: hourly, routes: { default: hourly, alert: rows } }
  rows: { from: hourly, steps: [] }
";

#[test]
fn a_stream_that_a_pipeline_writes_to_takes_no_message_of_a_device() {
    let (config, warnings) = parse_text(DERIVED).unwrap();
    assert_eq!(warnings, [""; 0]);
    assert_eq!(config.streams.keys().collect::<Vec<_>>(), ["clean", "default", "hourly", "hourly.out"]);
    assert_eq!((config.default_stream(), config.main_stream()), ("default", "default"));
    let takes: Vec<_> = config.streams.keys().filter(|name| config.takes_messages(name)).collect();
    assert_eq!(takes, ["default"]);
    let shown: Vec<_> = config.streams.keys().filter(|name| config.has_subscribers(name)).collect();
    assert_eq!(shown, ["clean", "default"]);
    let telemetry = &config.pipelines["telemetry"];
    assert_eq!(
        (telemetry.from.as_str(), telemetry.routes["default"].sinks()),
        ("default", &["clean".to_owned()][..])
    );
    assert_eq!(config.pipelines["rows"].routes["default"].sinks(), ["rows"]);
    assert_eq!(config.pipelines["hourly"].sinks().into_iter().collect::<Vec<_>>(), ["hourly", "rows"]);

    // Its topics let devices write to it as well.
    let text = "streams: { a: {}, b: { topics: [b/#] } }\npipelines: { p: { from: a, to: b } }\n";
    let (config, _) = parse_text(text).unwrap();
    assert!(config.takes_messages("b") && config.has_subscribers("b"));
    assert_eq!((config.sinks.len(), config.default_stream()), (0, "a"));

    // A sink of that name is meant by a route.
    let (config, _) = parse_text("pipelines: { p: { routes: { default: telemetry } } }\n").unwrap();
    assert_eq!((config.written_streams().len(), config.default_stream()), (0, "telemetry"));
}

#[test]
fn what_a_pipeline_writes_to_must_be_a_stream_that_does_not_lead_back() {
    let lines = problems(
        "streams: { a: {}, b: {}, c: {}, rows: {}, other: { topics: [x/#], topic_prefix: y } }
sinks: { rows: { type: sqlite, path: x.db, table: t } }
pipelines:
  p: { from: a, to: b }
  q: { from: b, routes: { default: c } }
  r: { from: c, to: a }
  s: { from: b, to: claen }
  t: { from: b, to: rows }
  u: { from: other, to: other }
",
    );
    let expected = [
        "headworks.yaml:1: streams.other.topic_prefix: is for a stream that only pipelines write, and `topics` lets devices write to this one",
        "headworks.yaml:4: pipelines.p.to: leads back to the stream that the pipeline reads: a -> b -> c -> a",
        "headworks.yaml:5: pipelines.q.routes: leads back to the stream that the pipeline reads: b -> c -> a -> b",
        "headworks.yaml:6: pipelines.r.to: leads back to the stream that the pipeline reads: c -> a -> b -> c",
        "headworks.yaml:7: pipelines.s.to: no stream `claen`, known are a, b, c, other, rows",
        "headworks.yaml:8: pipelines.t.to: `rows` is the name of a sink too: give the stream another name",
        "headworks.yaml:9: pipelines.u.to: leads back to the stream that the pipeline reads: other -> other",
    ];
    for line in expected {
        assert!(lines.iter().any(|known| known == line), "{line}\nnot in {lines:#?}");
    }
}
