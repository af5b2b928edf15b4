//! Threads for what no message's acknowledgement waits for, apart from those that serve
//! connections: the kernel puts a thread that ever does short work on a core as soon
//! as a client's bytes come, and lets one wait that works long.

use std::thread::available_parallelism;

use tokio::runtime::{Builder, Handle, Runtime};

use crate::threads;

pub struct Background(Option<Runtime>);

impl Background {
    /// Gives way to the thread that calls.
    pub fn start() -> std::io::Result<Self> {
        let cores = available_parallelism().map_or(1, Into::into);
        let nicer = threads::nicer()?;
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(cores.div_ceil(2)).thread_name("background").enable_time();
        builder.on_thread_start(move || threads::give_way(nicer));
        builder.on_thread_unpark(threads::begin_turn);
        builder.build().map(|runtime| Self(Some(runtime)))
    }

    pub fn handle(&self) -> Handle {
        self.0.as_ref().expect("there until it is dropped").handle().clone()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Called from another runtime's thread, which may not wait.
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[test]
    fn what_runs_there_gives_way_and_so_does_its_reading_from_disk() {
        let background = Background::start().unwrap();
        let nice = || getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let there = async move { [nice(), tokio::task::spawn_blocking(nice).await.unwrap()] };
        let there = background.handle().spawn(there);
        let here = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(here.block_on(there).unwrap(), [threads::nicer().unwrap(); 2]);
    }
}
