//! The compiling child: gives up what it does not need, then reads the file.
//!
//! Limits hold on address space, CPU time and files. Where the kernel has
//! seccomp, the child can do nothing but compute, and read and write what it has
//! open: no file, no socket, no process. It dies with the host, and before the
//! host where memory runs out.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::process::{
    Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::compile::{self, CHILD_COMMAND, CHILD_VARIABLE, OUT_OF_MEMORY, Order};
use super::load::{FILE_BYTES_MAX, LoadError};

/// What computing, and reading and writing the socket, needs.
const SYSTEM_CALLS: [libc::c_long; 27] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
const FAILED: u8 = 4;

/// `main` of the compiling child: to be called first thing when the first
/// argument is [`CHILD_COMMAND`]. The arguments are not used.
pub fn compile_child_main(_args: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(child_main())
}

pub(super) fn child_main() -> u8 {
    let order = std::env::var(CHILD_VARIABLE).ok().and_then(|text| serde_json::from_str::<Order>(&text).ok());
    let Some(order) = order else {
        eprintln!("{CHILD_COMMAND} is started by headworks itself");
        return FAILED;
    };
    match serve(&order) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            FAILED
        }
    }
}

fn serve(order: &Order) -> io::Result<()> {
    let mut socket = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    confine(order)?;
    let mut file = Vec::new();
    (&socket).take(FILE_BYTES_MAX + 1).read_to_end(&mut file)?;
    let compiled = compile::compile(&file);
    if let Err(LoadError::Invalid(reason)) = &compiled.report.kind
        && OUT_OF_MEMORY.iter().any(|text| reason.contains(text))
    {
        // The limit's doing, not the file's form.
        return Err(io::Error::other(reason.clone()));
    }
    socket.write_all(&compiled.encode())
}

fn confine(order: &Order) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid().is_none_or(|parent| parent.as_raw_pid() as u32 != order.parent) {
        return Err(io::Error::other("the host has ended"));
    }
    // Courtesies: without them the limits still hold.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = rustix::process::nice(order.nice);
    let limit = |resource, current, maximum| {
        setrlimit(resource, Rlimit { current: Some(current), maximum: Some(maximum) })
    };
    limit(Resource::As, order.memory, order.memory)?;
    // A second apart, so that its signal says which limit it was: SIGXCPU, not SIGKILL.
    limit(Resource::Cpu, order.cpu_s, order.cpu_s + 1)?;
    for none in [Resource::Fsize, Resource::Core, Resource::Nofile] {
        limit(none, 0, 0)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    // A kernel or an architecture without it: the limits still hold.
    if let Ok(filter) = only_compute() {
        let _ = seccompiler::apply_filter_all_threads(&filter);
    }
    Ok(())
}

/// Every other system call fails with EPERM.
fn only_compute() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        SYSTEM_CALLS.into_iter().map(|call| (call, Vec::new())).collect();
    // For `abort`: a signal to itself, and to nobody else.
    let itself = getpid().as_raw_pid() as u64;
    let to_itself = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, itself)?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![to_itself])?]);
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;

    use super::*;

    const PROBE: &str = "HEADWORKS_TEST_CONFINED";

    /// Not a test of its own: what the next one starts.
    #[test]
    fn as_confined() {
        if std::env::var_os(PROBE).is_none() {
            return;
        }
        let parent = getppid().expect("our test");
        let order = Order { parent: parent.as_raw_pid() as u32, cpu_s: 60, memory: 4 << 30, nice: 0 };
        confine(&order).expect("limits can be lowered");
        let can = [
            File::open("/proc/self/exe").is_ok(),
            UdpSocket::bind("127.0.0.1:0").is_ok(),
            Command::new("/bin/true").status().is_ok(),
            rustix::process::test_kill_process(parent).is_ok(),
            setrlimit(Resource::Nofile, Rlimit { current: Some(9), maximum: Some(9) }).is_ok(),
        ];
        std::process::exit(can.iter().filter(|can| **can).count() as i32);
    }

    #[test]
    fn the_child_can_open_nothing_reach_nobody_and_signal_nobody() {
        let mut child = Command::new(std::env::current_exe().expect("a file"));
        child.args([
            "--exact",
            "plugin::compile_child::tests::as_confined",
            "--nocapture",
            "--test-threads=1",
        ]);
        let status = child.env(PROBE, "1").status().expect("it starts");
        assert_eq!(status.code(), Some(0), "{status}");
    }
}
