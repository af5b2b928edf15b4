//! Access plugins: who may connect, and what each client may do.
//!
//! ```
//! use headworks_guest::access::{Access, Connecting, Decision, Identity, PUBLISH, named, rule};
//! use headworks_guest::config::{Config, Problem};
//! use headworks_guest::plugin::Context;
//!
//! /// Lets everybody publish below their own client id.
//! struct Open;
//!
//! impl Access for Open {
//!     fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
//!         config.fields().finish().map(|()| Self)
//!     }
//!
//!     fn authenticate(&mut self, who: &Connecting) -> Decision {
//!         let rules = vec![rule(PUBLISH, format!("{}/#", who.client_id), true)];
//!         Decision::Accept(Identity { rules, ..named(&who.client_id) })
//!     }
//! }
//!
//! headworks_guest::access_plugin!(Open);
//! ```

use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;

use crate::config::{Config, Problem};
use crate::plugin::Context;

#[doc(hidden)]
pub use crate::bindings::exports::headworks::plugin::lifecycle;
#[doc(hidden)]
pub use crate::bindings::only_access::exports::headworks::plugin::access as exported;
#[doc(hidden)]
pub use crate::bindings::{self, export_base, only_access, only_access::export_only_access};

pub use crate::bindings::only_access::exports::headworks::plugin::access::{
    Connecting, Decision, Identity, Question, Refusal, Rule,
};
pub use crate::bindings::only_access::headworks::plugin::types::Property;

/// Actions of a rule, to be added.
pub const PUBLISH: u32 = 1;
pub const SUBSCRIBE: u32 = 2;
/// Of what a client is subscribed to; without a rule of its own all is received.
pub const RECEIVE: u32 = 4;
/// MQTT 5's reasons for a refusal.
pub const BAD_USER_NAME_OR_PASSWORD: u8 = 0x86;
pub const NOT_AUTHORIZED: u8 = 0x87;
pub const BAD_AUTHENTICATION_METHOD: u8 = 0x8c;

/// An access plugin. Name, version and summary are those of its Cargo package.
pub trait Access: Sized {
    /// JSON Schema of its config; empty for none.
    const CONFIG_SCHEMA: &'static str = "";

    /// Once per instance, before any client, and to validate a config.
    fn new(config: &Config, context: &Context) -> Result<Self, Vec<Problem>>;

    /// Of one client. More than one instance runs, and each is replaced at any
    /// time: what is kept here is a cache.
    fn authenticate(&mut self, who: &Connecting) -> Decision;

    /// The client's answer to `Decision::More`.
    fn go_on(&mut self, exchange: u64, data: &[u8]) -> Decision {
        let _ = (exchange, data);
        refuse(NOT_AUTHORIZED, "this plugin asks nothing")
    }

    /// Whether a client may, where its first rule that matches is [`ask`]. Any
    /// instance is asked, and the answer is kept for as long as the client's
    /// connection, so that it must come from the config and the question alone.
    fn authorize(&mut self, question: &Question) -> bool {
        let _ = question;
        false
    }
}

/// A rule for topics that `filter` matches; the first that matches decides.
pub fn rule(actions: u32, filter: impl Into<String>, allow: bool) -> Rule {
    Rule { actions, filter: filter.into(), effect: u32::from(allow) }
}

/// A rule that leaves these topics to [`Access::authorize`].
pub fn ask(actions: u32, filter: impl Into<String>) -> Rule {
    Rule { actions, filter: filter.into(), effect: 2 }
}

/// A client of this name that may do nothing yet.
pub fn named(name: &str) -> Identity {
    Identity { name: name.into(), device: None, rules: Vec::new(), attributes: Vec::new(), valid_for_s: 0 }
}

/// The reason is logged, never sent.
pub fn refuse(code: u8, reason: impl Into<String>) -> Decision {
    Decision::Refuse(Refusal { code, reason: reason.into() })
}

/// Not a client of this plugin: the next authenticator is asked.
pub fn pass() -> Decision {
    refuse(0, "")
}

/// The one instance of a component; used by `access_plugin!` only.
#[doc(hidden)]
pub struct Slot<A>(RefCell<Option<A>>);

impl<A: Access> Slot<A> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    pub fn init(&self, context: lifecycle::Context) -> Result<lifecycle::Ready, Vec<lifecycle::Problem>> {
        let (access, _) = crate::plugin::exports::start(context, A::new)?;
        *self.0.borrow_mut() = Some(access);
        Ok(lifecycle::Ready { topics: None, extras: Vec::new() })
    }

    pub fn with<T>(&self, decide: impl FnOnce(&mut A) -> T) -> T {
        decide(self.0.borrow_mut().as_mut().expect("the host calls init first"))
    }
}

#[doc(hidden)]
pub fn describe<A: Access>(name: &str, version: &str, summary: &str) -> lifecycle::Description {
    lifecycle::Description {
        name: name.replace('_', "-"),
        version: version.into(),
        summary: summary.into(),
        topics: Vec::new(),
        config_schema: A::CONFIG_SCHEMA.into(),
        state_version: 0,
        extras: Vec::new(),
    }
}

/// Makes a component of a type that is an [`Access`]: once per crate, as
/// [`crate::plugin!`] does of a plugin.
#[macro_export]
macro_rules! access_plugin {
    ($access:ty) => {
        #[cfg(not(target_family = "wasm"))]
        const _: fn(
            &$crate::config::Config,
            &$crate::plugin::Context,
        ) -> Result<$access, Vec<$crate::config::Problem>> = <$access as $crate::access::Access>::new;

        #[cfg(target_family = "wasm")]
        const _: () = {
            use $crate::access::{self, exported, lifecycle};

            ::std::thread_local! {
                static RUNNING: access::Slot<$access> = const { access::Slot::new() };
            }

            struct Component;

            impl lifecycle::Guest for Component {
                fn describe() -> lifecycle::Description {
                    access::describe::<$access>(
                        env!("CARGO_PKG_NAME"),
                        env!("CARGO_PKG_VERSION"),
                        env!("CARGO_PKG_DESCRIPTION"),
                    )
                }

                fn init(context: lifecycle::Context) -> Result<lifecycle::Ready, Vec<lifecycle::Problem>> {
                    RUNNING.with(|slot| slot.init(context))
                }
            }

            impl exported::Guest for Component {
                fn authenticate(who: exported::Connecting) -> exported::Decision {
                    RUNNING.with(|slot| slot.with(|access| access::Access::authenticate(access, &who)))
                }

                fn continue_authentication(exchange: u64, data: Vec<u8>) -> exported::Decision {
                    RUNNING.with(|slot| slot.with(|access| access::Access::go_on(access, exchange, &data)))
                }

                fn authorize(questions: Vec<exported::Question>) -> Vec<u8> {
                    let answer = |access: &mut $access, question| {
                        u8::from(access::Access::authorize(access, question))
                    };
                    RUNNING.with(|slot| {
                        slot.with(|access| {
                            questions.iter().map(|question| answer(access, question)).collect()
                        })
                    })
                }
            }

    $crate::access::export_base!(Component with_types_in $crate::access::bindings);
    $crate::access::export_only_access!(Component with_types_in $crate::access::only_access);
        };
    };
}
