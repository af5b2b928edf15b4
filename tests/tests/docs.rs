//! What the pages say exists: links, files, commands, make targets, config keys, metrics; and the first commands run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use headworks_tests::folder::root;
use headworks_tests::host::{Host, binary, fresh, prebuilt};
use headworks_tests::process::run;
use headworks_tests::{mosquitto, telemetry};

struct Page {
    /// Relative to the root.
    name: String,
    text: String,
}

impl Page {
    fn folder(&self) -> PathBuf {
        root().join(&self.name).parent().expect("a page lies in a folder").to_owned()
    }

    /// Each line outside fenced blocks, with its number.
    fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut fenced = false;
        (1..).zip(self.text.lines()).filter(move |(_, line)| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
    }

    /// Each line of the fenced blocks in one of these languages, with its number.
    fn fenced<'a>(&'a self, languages: &'a [&str]) -> impl Iterator<Item = (usize, &'a str)> {
        let mut language = None;
        (1..).zip(self.text.lines()).filter(move |(_, line)| {
            if let Some(info) = line.trim_start().strip_prefix("```") {
                language = if language.is_some() { None } else { Some(info.trim()) };
                return false;
            }
            language.is_some_and(|language| languages.contains(&language))
        })
    }

    /// Each `code` span of the prose, with its line's number.
    fn spans(&self) -> impl Iterator<Item = (usize, &str)> {
        self.prose()
            .flat_map(|(number, line)| line.split('`').skip(1).step_by(2).map(move |span| (number, span)))
    }
}

/// Every page under version control, or that would be.
fn pages() -> Vec<Page> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"])
        .current_dir(root())
        .output()
        .expect("git");
    let names = String::from_utf8(listed.stdout).expect("names of pages");
    let pages: Vec<_> = names
        .split_terminator('\0')
        .filter(|name| root().join(name).exists())
        .map(|name| Page {
            name: name.to_owned(),
            text: std::fs::read_to_string(root().join(name)).expect("a page"),
        })
        .collect();
    assert!(pages.len() > 10, "git lists {} pages", pages.len());
    pages
}

/// Fails with every fault of every page at once.
fn assert_none(what: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{what}:\n{}", faults.join("\n"));
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn has_anchor(page: &Path, wanted: &str) -> bool {
    let text = std::fs::read_to_string(page).unwrap_or_default();
    text.lines().any(|line| line.starts_with('#') && anchor(line.trim_start_matches('#')) == wanted)
}

#[test]
fn links_lead_somewhere() {
    let mut faults = Vec::new();
    for page in pages() {
        for (number, line) in page.prose() {
            for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                if link.contains("://") || link.starts_with("mailto:") {
                    continue;
                }
                let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
                let target = if file.is_empty() { root().join(&page.name) } else { page.folder().join(file) };
                if !target.exists() || !fragment.is_empty() && !has_anchor(&target, fragment) {
                    faults.push(format!("{}:{number}: {link}", page.name));
                }
            }
        }
    }
    assert_none("links that lead nowhere", &faults);
}

/// A page names a source file from the root, from its own folder, or, as `ARCHITECTURE.md` says of
/// its tables, from `host/src/` or one of the folders below it.
#[test]
fn named_source_files_exist() {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git");
    let files = String::from_utf8(listed.stdout).expect("names of files");
    let exists = |name: &str| {
        files.lines().any(|file| {
            root().join(file).exists()
                && (file == name || file.strip_suffix(name).is_some_and(|before| before.ends_with('/')))
        })
    };
    let mut faults = Vec::new();
    for page in pages() {
        for (number, span) in page.spans() {
            let is_file = [".rs", ".sh", ".md", ".py", ".mjs"].iter().any(|ending| span.ends_with(ending));
            if is_file && !span.contains(['*', ' ', '<', '$', '{']) && !exists(span.trim_start_matches("../"))
            {
                faults.push(format!("{}:{number}: {span}", page.name));
            }
        }
    }
    assert_none("files that do not exist", &faults);
}

/// `ARCHITECTURE.md` has a table of floors: a file uses modules of its own floor and of lower ones.
#[test]
fn a_file_uses_no_module_of_a_higher_floor() {
    let page = std::fs::read_to_string(root().join("host/ARCHITECTURE.md")).expect("the page");
    let mut floors = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| ")) {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (Some(Ok(floor)), Some(modules)) = (cells.next().map(str::parse::<u8>), cells.next()) else {
            continue;
        };
        floors.extend(modules.split('`').skip(1).step_by(2).map(|module| (module, floor)));
    }
    assert!(floors.len() > 20, "{floors:?}");
    let listed =
        Command::new("git").args(["ls-files", "host/src"]).current_dir(root()).output().expect("git");
    let files = String::from_utf8(listed.stdout).expect("names of files");
    let is_code = |file: &&str| file.ends_with(".rs") && !file.contains("tests") && !file.contains("fuzzing");
    let mut faults = Vec::new();
    for file in files.lines().filter(is_code) {
        let Ok(text) = std::fs::read_to_string(root().join(file)) else { continue };
        let module = file["host/src/".len()..].split(['/', '.']).next().unwrap_or_default();
        let Some(own) = floors.get(module) else {
            assert!(matches!(module, "lib" | "main"), "{module} is on no floor");
            continue;
        };
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for used in code.split("crate::").skip(1) {
            let several = used.strip_prefix('{').and_then(|rest| rest.split('}').next());
            for used in
                several.unwrap_or(used).split(", ").take(if several.is_some() { usize::MAX } else { 1 })
            {
                let end = used.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(used.len());
                if floors.get(&used[..end]).is_none_or(|floor| floor > own) {
                    faults.push(format!("{file}: {}", &used[..end]));
                }
            }
        }
    }
    assert_none("uses of a higher floor, or of a module on no floor", &faults);
}

#[test]
fn make_targets_exist() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).expect("Makefile");
    let targets: BTreeSet<_> = makefile
        .lines()
        .filter(|line| !line.starts_with(['\t', ' ', '.', '#']))
        .filter_map(|line| line.split_once(':').map(|(target, _)| target))
        .collect();
    let mut faults = Vec::new();
    for page in pages() {
        for (number, command) in page.fenced(&["sh"]).chain(page.spans()) {
            let Some(rest) = command.trim_start().strip_prefix("make ") else { continue };
            let target = rest.split_whitespace().find(|word| !word.contains('='));
            if let Some(target) = target.filter(|target| !targets.contains(target)) {
                faults.push(format!("{}:{number}: make {target}", page.name));
            }
        }
    }
    assert_none("make targets that do not exist", &faults);
}

/// Asks the binary for the help of a command: its text, or `None` where there is no such command.
fn help(command: &[&str]) -> Option<String> {
    let output = Command::new(binary()).args(command).arg("--help").output().expect("headworks");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("help"))
}

/// Checks one line that calls `headworks`: each subcommand and each long option in it.
fn check_command(words: &[&str]) -> Result<(), String> {
    let mut command: Vec<&str> = Vec::new();
    let mut text = help(&[]).ok_or("no help")?;
    for word in words {
        if let Some(option) = word.strip_prefix("--") {
            let option = option.split('=').next().unwrap_or(option).trim_end_matches([']', ',', '.']);
            if !text.contains(&format!("--{option}")) {
                return Err(format!("headworks {} has no --{option}", command.join(" ")));
            }
        } else if text.contains("Commands:") && word.starts_with(|c: char| c.is_ascii_lowercase()) {
            command.push(word);
            text = help(&command).ok_or(format!("no command headworks {}", command.join(" ")))?;
        }
    }
    Ok(())
}

/// What follows the program's name in a shell line, up to whatever ends the command.
fn arguments(line: &str) -> Option<Vec<&str>> {
    let mut words = line.split_whitespace().skip_while(|word| word.contains('=') || *word == "$");
    let program = words.next()?;
    // What `$SYS/broker/version` says begins with the same word.
    if program.rsplit('/').next() != Some("headworks") || line.starts_with("headworks version ") {
        return None;
    }
    Some(words.take_while(|word| !matches!(*word, "#" | "|" | "||" | "&&" | "&" | ";" | ">" | "·")).collect())
}

#[test]
fn commands_and_their_options_exist() {
    let mut faults = Vec::new();
    let mut checked = BTreeSet::new();
    for page in pages() {
        for (number, line) in page.fenced(&["sh"]).chain(page.spans()) {
            let Some(words) = arguments(line).filter(|words| !words.is_empty()) else { continue };
            if !checked.insert(words.join(" ")) {
                continue;
            }
            if let Err(fault) = check_command(&words) {
                faults.push(format!("{}:{number}: {fault}", page.name));
            }
        }
    }
    assert!(!checked.is_empty(), "no page calls headworks");
    assert_none("commands that do not exist", &faults);
}

/// The first column of a generated page.
fn column(page: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join(page)).expect(page);
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split('`').next()).map(str::to_owned).collect()
}

/// Whether two parts of a key's path say the same: names of a user's choice and `*` stand for each other.
fn same_part(key: &str, said: &str) -> bool {
    let key = key.trim_end_matches("[]");
    key == said.trim_end_matches("[]") || key.starts_with('<') || said == "*"
}

#[test]
fn config_keys_exist() {
    let keys = column("host/CONFIG.md");
    let paths: Vec<Vec<&str>> = keys.iter().map(|key| key.split('.').collect()).collect();
    let sections: BTreeSet<&str> = paths
        .iter()
        .flat_map(|path| path.iter().rev().skip(1))
        .map(|part| part.trim_end_matches("[]"))
        .filter(|part| !part.starts_with('<'))
        .collect();
    let is_key = |said: &[&str]| {
        paths.iter().any(|path| {
            path.windows(said.len()).any(|part| part.iter().zip(said).all(|(key, said)| same_part(key, said)))
        })
    };
    let mut faults = Vec::new();
    for page in pages() {
        for (number, span) in page.spans() {
            let parts: Vec<&str> = span.split('.').collect();
            let is_path = parts.len() > 1
                && sections.contains(parts[0].trim_end_matches("[]"))
                && parts.iter().all(|part| {
                    !part.is_empty()
                        && part
                            .chars()
                            .all(|c| c.is_ascii_lowercase() || "_*[]".contains(c) || c.is_ascii_digit())
                });
            let is_file = ["rs", "md", "yaml", "json", "wit"].contains(&parts[parts.len() - 1]);
            let is_family = parts[parts.len() - 1].len() > 1 && span.ends_with('*');
            if is_path && !is_file && !is_family && !is_key(&parts) {
                faults.push(format!("{}:{number}: {span}", page.name));
            }
        }
    }
    assert_none("config keys that do not exist", &faults);
}

#[test]
fn every_path_of_the_admin_address_is_on_its_page() {
    let code = std::fs::read_to_string(root().join("host/src/admin/routes.rs")).expect("routes.rs");
    let page = std::fs::read_to_string(root().join("host/docs/admin-api.md")).expect("admin-api.md");
    let routes = code.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next());
    let routes: Vec<_> = routes.collect();
    let missing = routes.iter().filter(|route| !page.contains(&format!(" {route}`"))).copied();
    assert_eq!(missing.collect::<Vec<_>>(), [""; 0]);
    assert!(routes.len() >= 10, "{routes:?}");
}

#[test]
fn metrics_exist() {
    let metrics = column("host/METRICS.md");
    let exists = |said: &str| match said.strip_suffix('*') {
        Some(prefix) => metrics.iter().any(|metric| metric.starts_with(prefix)),
        None => ["", "_bucket", "_sum", "_count"]
            .iter()
            .any(|series| said.strip_suffix(series).is_some_and(|name| metrics.contains(name))),
    };
    let mut faults = Vec::new();
    for page in pages() {
        for (number, line) in page.prose() {
            let words = line.split(|c: char| !c.is_ascii_alphanumeric() && !"_*".contains(c));
            for word in words.filter(|word| word.starts_with("headworks_")) {
                // Tables and crates of the same prefix, and what a plugin registers.
                let other = [
                    "headworks_positions",
                    "headworks_guest",
                    "headworks_tests",
                    "headworks_stage",
                    "headworks_plugin_metric_NAME",
                    // The changelog names what is gone.
                    "headworks_step_run_duration_seconds",
                ];
                if !exists(word) && !other.contains(&word) {
                    faults.push(format!("{}:{number}: {word}", page.name));
                }
            }
        }
    }
    assert_none("metrics that do not exist", &faults);
}

#[test]
fn the_first_commands_of_the_readme_make_a_row() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let block = blocks.find(|block| block.contains("mosquitto_pub")).expect("it publishes");
    let mut host = Host::prepare("docs-readme", "");
    for (name, file) in [("normalize", "10-normalize"), ("enrich", "20-enrich"), ("route", "30-route")] {
        host.drop_plugin(&format!("{file}.wasm"), prebuilt(name));
    }
    host.run();
    // The page has the default ports, the default config and another folder.
    let script = format!(
        "mosquitto_pub() {{ command mosquitto_pub -p {} \"$@\"; }}\n\
         headworks() {{ {} \"$@\" --config headworks.yaml; }}\n{}",
        host.mqtt().port(),
        binary().display(),
        block.replace("cd ~/headworks\n", "").replace("./headworks ", "headworks ")
    );
    let said = run(Command::new("sh").args(["-c", &script]).current_dir(host.folder.path()));
    assert!(said.contains("sensor-001") && said.contains("21.5"), "{said}");
    assert!(said.contains("no dead letters"), "{said}");
}

/// What `headworks run` without a configuration has written goes on in place.
#[test]
fn the_second_config_of_the_readme_routes_alerts_and_writes_no_row_again() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut blocks = readme.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let second = blocks.find(|block| block.contains("alerts")).expect("it has routes");
    let mut host = Host::prepare("docs-second", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let rows = host.folder.join("data/telemetry.db");
    let publish = |host: &Host, topic: &str, payload: &str| {
        run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", payload]));
    };
    let send = |host: &Host, device: &str, value: u64| {
        let (topic, payload) = telemetry::message(device, value);
        publish(host, &topic, &payload);
    };
    // Above the plugin's limit, and from before there was one.
    send(&host, "sensor-1", 40);
    telemetry::written_to_sqlite(&host, &rows);
    host.stop();

    let first = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("ours");
    host.folder.write("headworks.yaml", first + second);
    host.drop_plugin("40-threshold.wasm", fresh("plugin-threshold"));
    host.run();
    publish(&host, "house/kitchen", "other topics make no row");
    send(&host, "sensor-2", 50);
    send(&host, "sensor-3", 20);
    let alerts = host.folder.join("data/alerts.db");
    // The steps drop one of the three messages.
    telemetry::read_behind_steps(&host, &rows, 2);
    telemetry::read_behind_steps(&host, &alerts, 2);
    assert_eq!(telemetry::sqlite_count(&rows, "telemetry"), 2, "sensors 1 and 3, once each");
    assert_eq!(telemetry::sqlite_count(&alerts, "telemetry"), 1, "sensor 2, and nothing from before");
    assert!(host.cli(&["dead-letters", "summary"]).contains("no dead letters"));
}
