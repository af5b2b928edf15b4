use std::time::Duration;

use super::super::test_plugins::{guarded, guarded_with, refusing};
use super::super::tests::batch;
use super::*;
use crate::batch::Partition;
use crate::step::Attempt;
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

    fn start_with(&self, compiler: Compiler) -> Plugins {
        Plugins::start_with(
            compiler,
            &self.config,
            &self.cache(),
            Arc::default(),
            Arc::default(),
            Failures::default(),
        )
        .unwrap()
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
    let mut chain = plugins.chain("telemetry", None);
    assert_eq!(names(&chain.borrow_and_update()), ["test 1.0.0 (3-a.wasm", "test 1.0.0 (20-b.wasm"]);
    let first = chain.borrow().generation;
    folder.put("10-c.wasm", &guarded());
    let chain = wait(&mut chain, |chain| chain.steps.len() == 3);
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
    let mut receiver = plugins.chain("telemetry", None);
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
    let receiver = plugins.chain("telemetry", None);
    let before = receiver.borrow().clone();
    let good = guarded();
    for (bytes, reason) in [
        (&good[..good.len() / 2], "truncated"),
        (b"hello, world", "not WebAssembly: starts with 68 65 6c 6c"),
        (&refusing()[..], "config.max: too big"),
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
    let mut receiver = plugins.chain("telemetry", None);
    assert_eq!(receiver.borrow_and_update().steps.len(), 2);
    std::fs::remove_file(folder.config.dir.join("1-redact.wasm")).unwrap();
    let held = wait(&mut receiver, |chain| chain.hold.is_some());
    assert!(held.hold.unwrap().contains("headworks plugin remove redact"));
    assert_eq!(held.steps.len(), 2);
    drop(plugins);
    // Not even a restart forgets it.
    let plugins = folder.start();
    let mut receiver = plugins.chain("telemetry", None);
    assert!(receiver.borrow_and_update().hold.is_some());
    super::super::remove(&folder.config.dir, "redact", &["redact".to_owned()]).unwrap();
    let chain = wait(&mut receiver, |chain| chain.hold.is_none());
    assert_eq!(chain.steps.len(), 1);
}

#[test]
fn an_explicit_step_keeps_its_last_good_version_without_its_file() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    let plugins = folder.start();
    let steps = [StepConfig::new("a"), StepConfig { name: Some("again".into()), ..StepConfig::new("a") }];
    let receiver = plugins.chain("telemetry", Some(&steps));
    assert_eq!((receiver.borrow().steps.len(), receiver.borrow().hold.clone()), (2, None));
    assert_eq!(&*receiver.borrow().steps[1].id().step, "again");
    std::fs::remove_file(folder.config.dir.join("1-a.wasm")).unwrap();
    wait_status(&plugins, |status| matches!(status[0].state, PluginState::Removed(_)));
    assert_eq!((receiver.borrow().steps.len(), receiver.borrow().hold.clone()), (2, None));
    let missing = plugins.chain("other", Some(&[StepConfig::new("nothing")]));
    assert!(missing.borrow().hold.as_deref().unwrap().contains("no file nothing.wasm"));
}

#[test]
fn a_cached_plugin_is_not_compiled_again_and_a_changed_artifact_is_not_used() {
    let folder = Folder::new();
    folder.put("1-a.wasm", &guarded());
    drop(folder.start());
    let no_compiler =
        || Compiler::child_of("/nonexistent/headworks".into(), Vec::new(), 1, crate::units::ByteSize::gib(1));
    assert_eq!(folder.start_with(no_compiler()).status()[0].state, PluginState::Active);
    let artifact = std::fs::read_dir(folder.cache())
        .unwrap()
        .map(|file| file.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "native"))
        .unwrap();
    let mut bytes = std::fs::read(&artifact).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&artifact, bytes).unwrap();
    let status = folder.start_with(no_compiler()).status();
    assert!(
        matches!(&status[0].state, PluginState::Failed(why) if why.contains("cannot start the compiler"))
    );
    // With a compiler it heals.
    assert_eq!(folder.start().status()[0].state, PluginState::Active);
    assert_eq!(folder.start_with(no_compiler()).status()[0].state, PluginState::Active);
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
    let mut receiver = plugins.chain("telemetry", None);
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
