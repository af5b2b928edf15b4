use std::time::Duration;

use super::super::OnFailure;
use super::super::compile::tests::child_args;
use super::super::test_plugins::{guarded, guarded_with, refusing};
use super::super::tests::batch;
use super::*;
use crate::batch::Partition;
use crate::step::{Attempt, RecallError};
use crate::units::Period;

struct Folder {
    dir: tempfile::TempDir,
    config: Config,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("plugins")).unwrap();
        let config = Config {
            dir: dir.path().join("plugins"),
            poll: Period(Duration::from_millis(50)),
            settle: Period(Duration::from_millis(100)),
            ..Config::default()
        };
        Self { dir, config }
    }

    /// As a careful copy does: under another name, then renamed.
    fn put(&self, file: &str, bytes: &[u8]) {
        let temporary = self.config.dir.join(".incoming");
        std::fs::write(&temporary, bytes).unwrap();
        std::fs::rename(&temporary, self.config.dir.join(file)).unwrap();
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn folders(&self) -> Folders {
        let recorded = Box::new(|| None);
        Folders { cache: self.cache(), kept: self.dir.path().join("files"), recorded }
    }

    fn start_with(&self, compiler: Compiler) -> Plugins {
        self.start_reporting(compiler, Failures::default())
    }

    fn start_reporting(&self, compiler: Compiler, failures: Failures) -> Plugins {
        let started = Plugins::start_with(
            compiler,
            &self.config,
            self.folders(),
            Places::default(),
            Arc::default(),
            Arc::default(),
            failures,
        );
        started.unwrap()
    }

    /// Puts what is no folder into the place of the folder, which is kept.
    fn take_away(&self, put_instead: impl FnOnce(&Path)) {
        std::fs::rename(&self.config.dir, self.dir.path().join("away")).unwrap();
        put_instead(&self.config.dir);
    }

    fn put_back(&self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.config.dir);
        std::fs::rename(self.dir.path().join("away"), &self.config.dir).unwrap();
    }

    fn start(&self) -> Plugins {
        self.start_with(Compiler::in_process())
    }
}

/// Waits for a chain, or a status, that is as wanted.
fn wait<T: Clone>(receiver: &mut watch::Receiver<T>, mut is: impl FnMut(&T) -> bool) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), receiver.wait_for(|now| is(now)))
            .await
            .expect("it did not come")
            .unwrap()
            .clone()
    })
}

/// A pipeline's first chain, once it is there.
fn chain(plugins: &Plugins, name: &str, steps: Option<&[StepConfig]>) -> watch::Receiver<Chain> {
    let mut receiver = plugins.chain(name, steps);
    wait(&mut receiver, |chain| chain.generation > 0);
    receiver
}

/// What is shown once everything was looked into.
fn loaded(plugins: &Plugins) -> Vec<PluginStatus> {
    wait(&mut plugins.shared.is_loaded.subscribe(), |loaded| *loaded);
    plugins.status()
}

fn wait_status(plugins: &Plugins, mut is: impl FnMut(&[PluginStatus]) -> bool) {
    wait(&mut plugins.shared.status.subscribe(), |status| is(status));
}

fn names(chain: &Chain) -> Vec<String> {
    chain.steps.iter().map(|step| step.describe().split(',').next().unwrap().to_owned()).collect()
}

#[test]
fn the_folders_plugins_run_by_the_number_in_front() {
    let folder = Folder::new();
    folder.put("20-b.wasm", &guarded());
    folder.put("3-a.wasm", &guarded());
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    assert_eq!(names(&receiver.borrow_and_update()), ["test 1.0.0 (3-a.wasm", "test 1.0.0 (20-b.wasm"]);
    let first = receiver.borrow().generation;
    folder.put("10-c.wasm", &guarded());
    let chain = wait(&mut receiver, |chain| chain.steps.len() == 3);
    assert!(chain.generation > first && chain.hold.is_none());
    assert_eq!(&*chain.steps[1].id().step, "c");
    let mut step = chain.steps[1].instantiate(0).unwrap();
    assert_eq!(step.run(batch(&["x"]), Partition(0), Attempt::FIRST).passed.len(), 1);
}

#[test]
fn a_changed_file_or_config_is_a_new_version_and_the_others_stay() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    folder.put("2-b.wasm", &guarded());
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    let before = receiver.borrow_and_update().clone();
    folder.put("1-a.wasm", &guarded_with("2.0.0", &[]));
    let after = wait(&mut receiver, |chain| chain.generation > before.generation);
    assert!(names(&after)[0].starts_with("test 2.0.0") && Arc::ptr_eq(&before.steps[1], &after.steps[1]));
    folder.put("2-b.yaml", b"max: 3\n");
    let last = wait(&mut receiver, |chain| chain.generation > after.generation);
    assert!(Arc::ptr_eq(&last.steps[0], &after.steps[0]) && !Arc::ptr_eq(&last.steps[1], &after.steps[1]));
}

#[test]
fn a_corrupt_file_or_a_refused_config_keeps_the_last_good_version() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    let plugins = folder.start();
    let receiver = chain(&plugins, "telemetry", None);
    let before = receiver.borrow().clone();
    let good = guarded();
    for (bytes, reason) in [
        (&good[..good.len() / 2], "truncated"),
        (b"hello, world", "not WebAssembly: starts with 68 65 6c 6c"),
        (&refusing()[..], "too big"),
    ] {
        folder.put("1-a.wasm", bytes);
        wait_status(&plugins, |status| match &status[0].state {
            PluginState::Failed(why) => why.contains(reason),
            _ => false,
        });
        let now = receiver.borrow().clone();
        assert!(now.hold.is_none() && Arc::ptr_eq(&now.steps[0], &before.steps[0]));
    }
    folder.put("1-a.wasm", &good);
    wait_status(&plugins, |status| status[0].state == PluginState::Active);
}

#[test]
fn a_removed_file_holds_its_pipeline_until_it_is_removed_for_good() {
    let folder = Folder::new();
    folder.put("1-redact.wasm", &guarded());
    folder.put("2-b.wasm", &guarded());
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    assert_eq!(receiver.borrow_and_update().steps.len(), 2);
    std::fs::remove_file(folder.config.dir.join("1-redact.wasm")).unwrap();
    let held = wait(&mut receiver, |chain| chain.hold.is_some());
    assert!(held.hold.unwrap().contains("headworks plugin remove redact"));
    assert_eq!(held.steps.len(), 2);
    drop(plugins);
    // Not even a restart forgets it.
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    assert!(receiver.borrow_and_update().hold.is_some());
    super::super::remove(&folder.config.dir, "redact", &["redact".to_owned()]).unwrap();
    let chain = wait(&mut receiver, |chain| chain.hold.is_none());
    assert_eq!(chain.steps.len(), 1);
}

#[test]
fn a_folder_that_cannot_be_read_holds_what_has_no_steps_and_is_a_problem() {
    let a_file = |place: &Path| std::fs::write(place, b"").unwrap();
    let a_link_to_nowhere = |place: &Path| std::os::unix::fs::symlink("nowhere", place).unwrap();
    let a_loop = |place: &Path| std::os::unix::fs::symlink(place, place).unwrap();
    let in_place: [&dyn Fn(&Path); 3] = [&a_file, &a_link_to_nowhere, &a_loop];
    for put_instead in in_place {
        let folder = Folder::new();
        folder.put("1-redact.wasm", &guarded());
        folder.take_away(put_instead);
        // The second start knows the step of the first.
        for ran_before in [false, true] {
            let failures = Failures::default();
            let plugins = folder.start_reporting(Compiler::in_process(), failures.clone());
            let mut all = chain(&plugins, "telemetry", None);
            let named = chain(&plugins, "named", Some(&[StepConfig::new("redact")]));
            for held in [&all, &named] {
                let held = held.borrow();
                let hold = held.hold.as_deref().unwrap();
                assert!(hold.contains("cannot read the plugins folder"), "{ran_before}: {hold}");
                assert!(held.steps.is_empty());
            }
            let without = chain(&plugins, "without", Some(&[]));
            assert_eq!(without.borrow().hold, None, "it runs no plugin");
            let standing = failures.standing();
            assert_eq!((&*standing[0].part, standing[0].kind), ("plugins folder", "plugin_failed"));

            std::fs::remove_file(&folder.config.dir).unwrap();
            wait_status(&plugins, |_| failures.standing()[0].cause.contains("not found"));
            assert!(all.borrow().hold.is_some(), "a folder that is gone has not become empty");
            folder.put_back();
            let goes_on = wait(&mut all, |chain| chain.hold.is_none());
            assert_eq!((goes_on.steps.len(), failures.standing()), (1, vec![]));

            folder.take_away(put_instead);
            wait_status(&plugins, |_| !failures.standing().is_empty());
            let now = all.borrow().clone();
            assert!(now.hold.is_none() && Arc::ptr_eq(&now.steps[0], &goes_on.steps[0]), "what runs goes on");
        }
    }
}

#[test]
fn a_plugins_folder_that_is_moved_away_is_one_problem_and_what_runs_goes_on() {
    let folder = Folder::new();
    folder.put("1-redact.wasm", &guarded());
    let failures = Failures::default();
    let plugins = folder.start_reporting(Compiler::in_process(), failures.clone());
    let mut all = chain(&plugins, "telemetry", None);
    let before = wait(&mut all, |chain| chain.steps.len() == 1);
    folder.take_away(|_| {});
    wait_status(&plugins, |_| !failures.standing().is_empty());
    let standing = failures.standing();
    assert_eq!((standing.len(), &*standing[0].part), (1, "plugins folder"));
    assert!(standing[0].advice.starts_with("put "), "{}", standing[0].advice);
    let now = all.borrow().clone();
    assert!(now.hold.is_none() && Arc::ptr_eq(&now.steps[0], &before.steps[0]));
    wait_status(&plugins, |status| status.iter().all(|plugin| matches!(plugin.state, PluginState::Active)));
    folder.put_back();
    wait_status(&plugins, |_| failures.standing().is_empty());
}

#[test]
fn a_host_that_cannot_read_which_steps_ran_does_not_start() {
    let folder = Folder::new();
    drop(Cache::open(&folder.cache()).unwrap());
    std::fs::create_dir(folder::known_steps_file(&folder.cache())).unwrap();
    let started = Plugins::start_with(
        Compiler::in_process(),
        &folder.config,
        folder.folders(),
        Places::default(),
        Arc::default(),
        Arc::default(),
        Failures::default(),
    );
    let error = started.err().unwrap().to_string();
    assert!(error.contains("folder-steps"), "{error}");
}

#[test]
fn an_explicit_step_keeps_its_last_good_version_without_its_file() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    let plugins = folder.start();
    let steps = [StepConfig::new("a"), StepConfig { name: Some("again".into()), ..StepConfig::new("a") }];
    let receiver = chain(&plugins, "telemetry", Some(&steps));
    assert_eq!((receiver.borrow().steps.len(), receiver.borrow().hold.clone()), (2, None));
    assert_eq!(&*receiver.borrow().steps[1].id().step, "again");
    std::fs::remove_file(folder.config.dir.join("1-a.wasm")).unwrap();
    wait_status(&plugins, |status| matches!(status[0].state, PluginState::Removed(_)));
    assert_eq!((receiver.borrow().steps.len(), receiver.borrow().hold.clone()), (2, None));
    let missing = chain(&plugins, "other", Some(&[StepConfig::new("nothing")]));
    assert!(missing.borrow().hold.as_deref().unwrap().contains("no file nothing.wasm"));
}

#[test]
fn a_cached_plugin_is_not_compiled_again_and_a_changed_artifact_is_not_used() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    loaded(&folder.start());
    let no_compiler =
        || Compiler::child_of("/nonexistent/headworks".into(), Vec::new(), 1, crate::units::ByteSize::gib(1));
    assert_eq!(loaded(&folder.start_with(no_compiler()))[0].state, PluginState::Active);
    let artifact = std::fs::read_dir(folder.cache())
        .unwrap()
        .map(|file| file.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "native"))
        .unwrap();
    let mut bytes = std::fs::read(&artifact).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&artifact, bytes).unwrap();
    let status = loaded(&folder.start_with(no_compiler()));
    assert!(
        matches!(&status[0].state, PluginState::Failed(why) if why.contains("cannot start the compiler"))
    );
    // With a compiler it heals.
    assert_eq!(loaded(&folder.start())[0].state, PluginState::Active);
    assert_eq!(loaded(&folder.start_with(no_compiler()))[0].state, PluginState::Active);
}

#[test]
fn a_cache_that_others_can_write_to_or_that_is_a_link_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    drop(Cache::open(&folder.cache()).unwrap());
    std::fs::set_permissions(folder.cache(), std::fs::Permissions::from_mode(0o777)).unwrap();
    assert!(Cache::open(&folder.cache()).unwrap_err().to_string().contains("others may write"));
    let link = folder.dir.path().join("link");
    std::os::unix::fs::symlink(&folder.config.dir, &link).unwrap();
    assert!(Cache::open(&link).unwrap_err().to_string().contains("not a link"));
}

#[test]
fn a_mark_of_an_earlier_removal_does_not_hide_a_loss() {
    let folder = Folder::new();
    folder::remove(&folder.config.dir, "redact", &["redact".to_owned()]).unwrap();
    folder.put("1-redact.wasm", &guarded());
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    assert_eq!(receiver.borrow_and_update().steps.len(), 1);
    std::fs::remove_file(folder.config.dir.join("1-redact.wasm")).unwrap();
    let held = wait(&mut receiver, |chain| chain.hold.is_some() || chain.steps.is_empty());
    assert!(held.hold.is_some_and(|why| why.contains("plugin remove redact")));
}

#[test]
fn a_folder_that_is_not_there_is_made() {
    let mut folder = Folder::new();
    folder.config.dir = folder.dir.path().join("a/b");
    folder.start();
    assert!(folder.config.dir.is_dir());
}

/// The hold of the folder's pipeline in a fresh host that finds this file beside a good one.
fn hold_with(file: &str, bytes: &[u8]) -> Option<String> {
    let folder = Folder::new();
    folder.put("10-a.wasm", &guarded());
    folder.put(file, bytes);
    let plugins = folder.start();
    let hold = chain(&plugins, "telemetry", None).borrow().hold.clone();
    hold.map(|why| why.to_string())
}

#[test]
fn a_file_that_is_there_at_the_start_and_does_not_run_holds_the_pipeline() {
    let good = guarded();
    for (file, bytes, reason) in [
        ("15-redact.wasm", &good[..good.len() / 2], "truncated"),
        ("15-redact.wasm", &refusing(), "too big"),
        ("15-redact.WASM", &good, "small letters"),
        ("15-re dact.wasm", &good, "its name must be like"),
        ("15-routes.wasm", &good, "its name must not be routes"),
        ("15-a.wasm", &good, ""),
    ] {
        let hold = hold_with(file, bytes);
        assert_eq!(hold.is_some(), !reason.is_empty(), "{file}: {hold:?}");
        assert!(hold.is_none_or(|why| why.contains(reason) && why.contains(file)), "{file}");
    }
}

#[test]
fn what_is_missing_from_the_start_comes_by_a_good_file_or_goes_by_plugin_remove() {
    let folder = Folder::new();
    folder.put("15-redact.wasm", b"half a copy");
    let plugins = folder.start();
    let mut receiver = chain(&plugins, "telemetry", None);
    assert!(receiver.borrow_and_update().hold.as_deref().unwrap().contains("plugin remove redact"));
    std::fs::remove_file(folder.config.dir.join("15-redact.wasm")).unwrap();
    wait_status(&plugins, |status| matches!(status[0].state, PluginState::Removed(_)));
    assert!(receiver.borrow().hold.is_some(), "a file that went is missed");
    folder.put("15-redact.wasm", &guarded());
    assert_eq!(wait(&mut receiver, |chain| chain.hold.is_none()).steps.len(), 1);
    // Into a pipeline that runs a file may come that is broken.
    folder.put("20-new.wasm", b"half a copy");
    wait_status(&plugins, |status| status.len() == 2 && matches!(status[1].state, PluginState::Failed(_)));
    assert_eq!((receiver.borrow().hold.clone(), receiver.borrow().steps.len()), (None, 1));
}

/// A compiler that never answers, and what needs none.
#[test]
fn a_plugin_that_compiles_for_long_holds_up_neither_the_start_nor_others_nor_the_end() {
    let folder = Folder::new();
    folder.put("20-b.wasm", &guarded());
    loaded(&folder.start());
    folder.put("10-a.wasm", &guarded_with("2.0.0", &[]));
    let compiler = Compiler::child_of(
        "/bin/sh".into(),
        vec!["-c".into(), "exec sleep 3600".into()],
        1_000,
        crate::units::ByteSize::gib(1),
    );
    let plugins = folder.start_with(compiler);
    let all = plugins.chain("all", None);
    let named = chain(&plugins, "named", Some(&[StepConfig::new("b")]));
    assert_eq!((named.borrow().steps.len(), named.borrow().hold.clone()), (1, None));
    wait_status(&plugins, |status| {
        status.iter().all(|plugin| !plugin.file.is_empty())
            && status.iter().any(|plugin| plugin.name == "a" && plugin.state == PluginState::Loading)
    });
    assert_eq!(all.borrow().generation, 0);
    drop(plugins);
}

#[test]
fn a_compiler_that_could_not_be_started_is_tried_again() {
    let folder = Folder::new();
    folder.put("10-a.wasm", &guarded());
    let program = folder.dir.path().join("compiler");
    let compiler = Compiler::child_of(program.clone(), child_args(), 60, crate::units::ByteSize::gib(2));
    let plugins = folder.start_with(compiler);
    let mut receiver = chain(&plugins, "telemetry", None);
    assert!(receiver.borrow().hold.as_deref().unwrap().contains("cannot start the compiler"));
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), program).unwrap();
    wait(&mut receiver, |chain| chain.hold.is_none() && chain.steps.len() == 1);
}

#[test]
fn a_file_that_killed_its_compiler_is_not_tried_again_until_its_bytes_change() {
    let folder = Folder::new();
    folder.put("10-a.wasm", &guarded());
    let runs = folder.dir.path().join("runs");
    let script = format!("echo run >> {}; kill -SEGV $$", runs.display());
    let compiler = || {
        Compiler::child_of(
            "/bin/sh".into(),
            vec!["-c".into(), script.clone().into()],
            60,
            crate::units::ByteSize::gib(2),
        )
    };
    let count = || std::fs::read_to_string(&runs).unwrap().lines().count();
    for _ in 0..2 {
        let status = loaded(&folder.start_with(compiler()));
        assert!(
            matches!(&status[0].state, PluginState::Failed(why) if why.contains("ended the compiler")),
            "{status:?}"
        );
        assert_eq!(count(), 1);
    }
    folder.put("10-a.wasm", &guarded_with("2.0.0", &[]));
    loaded(&folder.start_with(compiler()));
    assert_eq!(count(), 2);
}

#[test]
fn a_refused_config_is_named_by_file_and_line() {
    let folder = Folder::new();
    folder.put("10-a.wasm", &refusing());
    folder.put("10-a.yaml", b"# limits\nmax: 3\n");
    let step = StepConfig { config: serde_json::json!({"max": 3}), ..StepConfig::new("a") };
    let root = crate::problems::KeyPath::root();
    let path = root.key("pipelines").key("named").key("steps").index(0).key("config").key("max");
    let plugins = Plugins::start_with(
        Compiler::in_process(),
        &folder.config,
        folder.folders(),
        Places::new([(path, crate::problems::Place { file: "headworks.yaml".into(), line: Some(14) })]),
        Arc::default(),
        Arc::default(),
        Failures::default(),
    )
    .unwrap();
    let hold = |name: &str, steps| chain(&plugins, name, steps).borrow().hold.clone().unwrap().to_string();
    assert!(hold("all", None).contains("10-a.yaml:2: max: too big"));
    let named = hold("named", Some(&[step][..]));
    assert!(named.ends_with("headworks.yaml:14: pipelines.named.steps[0].config.max: too big"), "{named}");
}

#[test]
fn a_step_is_made_again_by_another_process_though_the_cache_has_it_no_more() {
    let folder = Folder::new();
    folder.put("10-guarded.wasm", &guarded());
    let steps = [StepConfig { on_failure: OnFailure::Hold, ..StepConfig::new("guarded") }];
    let recipe = {
        let plugins = folder.start();
        let chain = chain(&plugins, "telemetry", Some(&steps)).borrow().clone();
        chain.steps[0].recipe()
    };
    std::fs::remove_file(folder.config.dir.join("10-guarded.wasm")).unwrap();
    let plugins = folder.start();
    let recalled = plugins.recall("telemetry")(&recipe).unwrap();
    assert_eq!((&*recalled.id().step, recalled.recipe()), ("guarded", recipe.clone()));
    let mut step = recalled.instantiate(0).unwrap();
    let mut run = || step.run(batch(&["P1", "P2", "P3", "P4", "five"]), Partition(0), Attempt::FIRST);
    assert!(run().held, "it may be the newest one");
    recalled.let_go();
    let outcome = run();
    assert_eq!((outcome.passed.len(), outcome.refused.len(), outcome.retry), (1, 4, None));
    drop(plugins);
    std::fs::remove_dir_all(folder.cache()).unwrap();
    let plugins = folder.start();
    assert!(plugins.recall("telemetry")(&recipe).is_ok(), "it is compiled from the file again");
    drop(plugins);
    std::fs::remove_dir_all(folder.cache()).unwrap();
    let file = std::fs::read_dir(folder.folders().kept).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&file, refusing()).unwrap();
    let plugins = folder.start();
    let said = || match plugins.recall("telemetry")(&recipe) {
        Err(RecallError::Gone(said)) => said,
        other => panic!("{:?}", other.err()),
    };
    assert!(said().contains("step guarded") && said().contains("nor in plugin-files"), "{}", said());
    std::fs::remove_file(&file).unwrap();
    assert!(said().contains("nor in plugin-files"), "{}", said());
    std::fs::create_dir(&file).unwrap();
    assert!(
        matches!(plugins.recall("telemetry")(&recipe), Err(RecallError::Later(_))),
        "it may be read later"
    );
}

/// A limit may be raised: whoever has the messages of such a version loses nothing until then.
#[test]
fn a_step_that_a_limit_keeps_from_being_compiled_again_is_made_once_the_limit_is_raised() {
    let folder = Folder::new();
    folder.put("10-guarded.wasm", &guarded());
    let recipe = {
        let plugins = folder.start();
        chain(&plugins, "telemetry", None).borrow().steps[0].recipe()
    };
    std::fs::remove_file(folder.config.dir.join("10-guarded.wasm")).unwrap();
    std::fs::remove_dir_all(folder.cache()).unwrap();
    let by = |script: &str, memory| {
        Compiler::child_of("/bin/sh".into(), vec!["-c".into(), script.into()], 60, memory)
    };
    let few = crate::units::ByteSize::mib(1);
    // What the compiler said is remembered: the second time nothing is compiled.
    let scripts = ["echo memory allocation of 7 bytes failed >&2; exit 1", "exit 1"];
    for script in scripts {
        let plugins = folder.start_with(by(script, few));
        let said = match plugins.recall("telemetry")(&recipe) {
            Err(RecallError::Later(said)) => said,
            other => panic!("{:?}", other.err()),
        };
        assert!(said.contains("plugins.compile_memory") && said.contains("plugin-files"), "{said}");
    }
    let plugins = folder.start_with(Compiler::child_of(
        std::env::current_exe().unwrap(),
        child_args(),
        60,
        crate::units::ByteSize::gib(2),
    ));
    assert!(plugins.recall("telemetry")(&recipe).is_ok());
}

#[test]
fn a_step_that_is_let_go_holds_no_more_and_rejects_what_it_faults_on() {
    let folder = Folder::new();
    folder.put("10-guarded.wasm", &guarded());
    let plugins = folder.start();
    let steps = [StepConfig { on_failure: OnFailure::Hold, ..StepConfig::new("guarded") }];
    let chain = chain(&plugins, "telemetry", Some(&steps)).borrow().clone();
    let mut step = chain.steps[0].instantiate(0).unwrap();
    let mut run = || step.run(batch(&["P1", "P2", "P3", "P4", "five"]), Partition(0), Attempt::FIRST);
    assert!(run().held && run().held);
    chain.steps[0].let_go();
    let outcome = run();
    assert_eq!((outcome.passed.len(), outcome.refused.len(), outcome.held), (1, 4, false));
}
