use super::super::load::Loadable;
use super::super::test_plugins::{bomb, guarded};
use super::*;

/// Not a test of its own: what the others start as their compiling child.
#[test]
fn as_child() {
    if std::env::var_os(CHILD_VARIABLE).is_some() {
        std::process::exit(child_main().into());
    }
}

fn compiler(cpu_s: u64, memory: ByteSize) -> Compiler {
    let args = ["--exact", "plugin::compile::tests::as_child", "--nocapture", "--test-threads=1"];
    let program = std::env::current_exe().unwrap();
    Compiler::child_of(program, args.map(OsString::from).to_vec(), cpu_s, memory)
}

fn compile(compiler: &Compiler, module: &[u8]) -> Result<Vec<u8>, CompileError> {
    let scratch = tempfile::tempdir().unwrap();
    let result = compiler.compile(&Loadable::new(module).unwrap().component, scratch.path());
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "the child's files are cleaned up");
    result
}

#[test]
fn a_child_compiles_what_this_process_would() {
    let artifact = compile(&compiler(30, ByteSize::gib(2)), &guarded()).unwrap();
    assert!(artifact == compile(&Compiler::in_process(), &guarded()).unwrap());
}

#[test]
fn a_bomb_is_stopped_by_the_cpu_limit() {
    // A busy machine gives the child, which is nice, little of its time.
    let compiler = Compiler { wall_s: 600, ..compiler(1, ByteSize::gib(4)) };
    let error = compile(&compiler, &bomb(100_000)).unwrap_err();
    assert!(matches!(error, CompileError::Cpu(1)), "{error}");
    assert!(error.to_string().contains("plugins.compile_cpu_s"));
}

#[test]
fn a_bomb_is_stopped_by_the_memory_limit() {
    let error = compile(&compiler(60, ByteSize::mib(256)), &bomb(100_000)).unwrap_err();
    assert!(matches!(error, CompileError::Memory(_)), "{error}");
}

#[test]
fn what_is_no_valid_component_is_refused_with_the_compilers_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let error = compiler(30, ByteSize::gib(2)).compile(b"\0asm\x0d\0\x01\0\xff", scratch.path()).unwrap_err();
    assert!(matches!(error, CompileError::Invalid(_)), "{error}");
}
