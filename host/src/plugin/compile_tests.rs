use super::super::compile_child::child_main;
use super::super::test_plugins::{bomb, guarded};
use super::*;

/// Not a test of its own: what the others start as their compiling child.
#[test]
fn as_child() {
    if std::env::var_os(CHILD_VARIABLE).is_some() {
        std::process::exit(child_main().into());
    }
}

/// How a test binary starts itself as the child.
pub(in super::super) fn compiler(cpu_s: u64, memory: ByteSize) -> Compiler {
    Compiler::child_of(THIS_PROGRAM.into(), child_args(), cpu_s, memory)
}

pub(in super::super) fn child_args() -> Vec<OsString> {
    ["--exact", "plugin::compile::tests::as_child", "--nocapture", "--test-threads=1"]
        .map(OsString::from)
        .into()
}

fn by_shell(script: &str) -> Compiler {
    Compiler::child_of("/bin/sh".into(), vec!["-c".into(), script.into()], 1, ByteSize::gib(2))
}

#[test]
fn a_child_compiles_what_this_process_would() {
    let there = compiler(30, ByteSize::gib(2)).compile(&guarded()).unwrap();
    let here = Compiler::in_process().compile(&guarded()).unwrap();
    assert!(there.artifact == here.artifact && !here.artifact.is_empty());
    assert_eq!((there.report.kind, there.report.imports), (here.report.kind, here.report.imports));
}

#[test]
fn a_bomb_is_stopped_by_the_cpu_limit() {
    // A busy machine gives the child, which is nice, little of its time.
    let compiler = Compiler { wall_s: 600, ..compiler(1, ByteSize::gib(4)) };
    let error = compiler.compile(&bomb(100_000)).unwrap_err();
    assert!(matches!(error, CompileError::Cpu(1)) && error.is_of_the_file(), "{error}");
    assert!(error.to_string().contains("plugins.compile_cpu_s"));
}

#[test]
fn a_bomb_is_stopped_by_the_memory_limit() {
    let error = compiler(60, ByteSize::mib(256)).compile(&bomb(100_000)).unwrap_err();
    assert!(matches!(error, CompileError::Memory(_)) && error.is_of_the_file(), "{error}");
}

#[test]
fn what_is_no_valid_component_is_refused_with_a_reason() {
    let compiled = compiler(30, ByteSize::gib(2)).compile(b"\0asm\x0d\0\x01\0\xff").unwrap();
    assert!(matches!(compiled.report.kind, Err(LoadError::Damaged(_))), "{:?}", compiled.report);
}

/// One changed byte there makes packages that depend on each other in a circle,
/// and the parser's stack overflow: it is the child's.
#[test]
fn no_changed_byte_of_a_plugins_metadata_ends_the_host() {
    let (good, compiler) = (guarded(), compiler(30, ByteSize::gib(2)));
    let find = |text: &[u8]| (0..good.len()).filter(|at| good[*at..].starts_with(text)).collect::<Vec<_>>();
    let metadata = find(b"component-type")[0];
    let names = find(b"headworks:plugin").into_iter().filter(|at| *at > metadata).map(|at| at + 7);
    let others = (metadata..good.len()).step_by((good.len() - metadata) / 30);
    for at in names.chain(others) {
        let mut changed = good.clone();
        changed[at] ^= 0x13;
        match compiler.compile(&changed) {
            Ok(compiled) => assert_eq!(compiled.report.kind.is_ok(), !compiled.artifact.is_empty()),
            Err(error) => assert!(error.is_of_the_file(), "byte {at}: {error}"),
        }
    }
}

#[test]
fn a_child_that_answers_nonsense_or_not_at_all_is_an_error() {
    for answer in ["true", "printf 1234 >&0", "printf '\\377\\377\\377\\377x' >&0", "cat <&0 >&0"] {
        let error = by_shell(answer).compile(&guarded()).unwrap_err();
        assert!(matches!(error, CompileError::Answer), "{answer}: {error}");
    }
    let error = by_shell("kill -SEGV $$").compile(&guarded()).unwrap_err();
    assert!(matches!(error, CompileError::Died(_)) && error.is_of_the_file(), "{error}");
    let error = by_shell("kill -KILL $$").compile(&guarded()).unwrap_err();
    assert!(matches!(error, CompileError::Killed(_)) && !error.is_of_the_file(), "{error}");
}

#[test]
fn a_compiler_that_is_stopped_ends_its_child() {
    let compiler = Compiler { wall_s: 3_600, ..by_shell("exec sleep 3600") };
    let stopping = compiler.clone();
    let compiling = thread::spawn(move || compiler.compile(&guarded()));
    stopping.stop();
    assert!(matches!(compiling.join().unwrap(), Err(CompileError::Stopped)));
}

/// The children of a process that have given up their rights.
fn confined_children(parent: u32) -> Vec<rustix::process::Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<i32> = children
        .flat_map(|list| list.split(' ').filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect();
    let is_confined = |id: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.contains("NoNewPrivs:\t1")
    };
    children.into_iter().filter(is_confined).filter_map(rustix::process::Pid::from_raw).collect()
}

#[test]
fn a_child_ends_with_a_host_that_is_killed() {
    const HOST: &str = "HEADWORKS_TEST_COMPILES";
    if std::env::var_os(HOST).is_some() {
        let _ = compiler(600, ByteSize::gib(4)).compile(&bomb(100_000));
        return;
    }
    // Else nobody could ask how a child ended whose parent is gone.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let test = ["--exact", "plugin::compile::tests::a_child_ends_with_a_host_that_is_killed"];
    let mut host = std::process::Command::new(THIS_PROGRAM);
    host.args(test).env(HOST, "1").stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut host = host.spawn().unwrap();
    let child = loop {
        match confined_children(host.id()).first() {
            Some(child) => break *child,
            None => thread::yield_now(),
        }
    };
    host.kill().unwrap();
    host.wait().unwrap();
    let ended = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()).unwrap();
    let (_, status) = ended.expect("it waits");
    assert_eq!(status.terminating_signal(), Some(Signal::KILL.as_raw()), "{status:?}");
}
