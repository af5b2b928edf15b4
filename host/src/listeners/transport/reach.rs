//! Detects whether clients can reach a listener. While they cannot, this is a problem, and the host is
//! not ready.

use std::io;

use super::bind::Bind;
use crate::files::{NO_DESCRIPTOR_ADVICE, lacks_descriptor};
use crate::telemetry::{Failures, Standing};

/// Kind of the problem.
pub const KIND: &str = "listener";

/// State of one listener.
pub(super) struct Reach<'f> {
    failures: &'f Failures,
    bind: Bind,
    has_fault: bool,
}

impl<'f> Reach<'f> {
    pub fn new(failures: &'f Failures, bind: Bind) -> Self {
        Self { failures, bind, has_fault: false }
    }

    /// Records an accepted connection.
    pub fn accepted(&mut self) {
        if std::mem::take(&mut self.has_fault) {
            self.failures.mended(&self.part(), KIND);
            tracing::info!(listener = %self.bind, "clients are accepted again");
        }
    }

    /// Records that connections wait and none can be accepted.
    pub fn refused(&mut self, error: &io::Error) {
        let advice = match lacks_descriptor(error) {
            true => NO_DESCRIPTOR_ADVICE,
            false => {
                "look at the kernel's log and at what the service may do; the host tries again by itself"
            }
        };
        self.stands(
            format!("no client can connect, connections are not accepted: {error}"),
            advice.to_owned(),
        );
    }

    /// Records the result of a check of the socket while no connection waits.
    pub fn note(&mut self, put_back: io::Result<bool>) {
        match put_back {
            Ok(was_gone) => {
                if was_gone {
                    tracing::warn!(listener = %self.bind, "the socket's file was removed, and has been created again");
                }
                self.accepted();
            }
            Err(error) => self.stands(
                format!("no client can connect, the socket's file was removed and cannot be made again: {error}"),
                format!(
                    "take away what is in the place of {}, and let the host's user write to its folder; the host \
                     tries again by itself",
                    self.bind
                ),
            ),
        }
    }

    fn stands(&mut self, cause: String, advice: String) {
        self.has_fault = true;
        self.failures.stands(Standing { part: self.part(), kind: KIND, cause, advice });
    }

    fn part(&self) -> String {
        format!("listener {}", self.bind)
    }
}

/// Ends the problem of a listener that is gone.
impl Drop for Reach<'_> {
    fn drop(&mut self) {
        self.failures.mended(&self.part(), KIND);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_nobody_reaches_is_a_problem_until_somebody_may_again() {
        let failures = Failures::default();
        let mut reach = Reach::new(&failures, "127.0.0.1:1883".parse().unwrap());
        let told =
            || failures.standing().into_iter().map(|it| (it.part, it.kind, it.advice)).collect::<Vec<_>>();
        let part = "listener 127.0.0.1:1883".to_owned();
        let descriptors = vec![(part.clone(), KIND, NO_DESCRIPTOR_ADVICE.to_owned())];
        for errno in [libc::EMFILE, libc::ENFILE] {
            reach.refused(&io::Error::from_raw_os_error(errno));
            assert_eq!(told(), descriptors);
            reach.accepted();
            assert_eq!(told(), []);
        }
        reach.refused(&io::Error::from_raw_os_error(libc::EPERM));
        assert!(told() != descriptors && told().len() == 1);
        reach.note(Ok(false));
        assert_eq!(told(), [], "nobody waits");
        reach.note(Err(io::ErrorKind::AddrInUse.into()));
        assert_eq!(told().len(), 1);
        reach.note(Ok(true));
        assert_eq!(told(), []);
    }
}
