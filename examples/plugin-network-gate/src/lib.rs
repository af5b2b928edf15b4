//! Knows clients by the network that they come from: for controllers in a
//! production network that can be given no password. Whoever comes from
//! elsewhere, or shows a user name, is left to the next authenticator.
//!
//! ```yaml
//! networks:
//!   - from: 10.1.4.0/24
//!     name: line-4
//!     presses: [ { topics: "acme/line-4/press/+/#", first: 1, last: 12 } ]
//!     publish: ["acme/line-4/status"]
//!     subscribe: ["acme/line-4/set/#"]
//! ```
//!
//! A topic filter knows no numbers, so that `presses` is a rule that asks: the
//! host wants to know of each topic once whether it is one of a press of the line.

use std::net::IpAddr;

use headworks_guest::access::{
    Access, Connecting, Decision, PUBLISH, Question, SUBSCRIBE, ask, named, pass, rule,
};
use headworks_guest::config::{Config, Fields, Problem};
use headworks_guest::plugin::Context;

struct Gate(Vec<Network>);

struct Network {
    from: IpAddr,
    bits: u8,
    name: String,
    presses: Vec<Presses>,
    publish: Vec<String>,
    subscribe: Vec<String>,
}

/// `+` of `topics` is a number from `first` to `last`.
struct Presses {
    topics: String,
    first: i64,
    last: i64,
}

impl Access for Gate {
    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        let mut fields = config.fields();
        let networks = fields.objects("networks", |fields| {
            let from = fields.required_string("from");
            let parsed = parse(&from);
            if parsed.is_none() {
                fields.problem("from", "must be a network such as 10.1.4.0/24");
            }
            let (from, bits) = parsed.unwrap_or((IpAddr::from([0; 4]), 32));
            Network {
                from,
                bits,
                name: fields.required_string("name"),
                presses: fields.objects("presses", Presses::read),
                publish: fields.strings("publish", &[]),
                subscribe: fields.strings("subscribe", &[]),
            }
        });
        fields.finish().map(|()| Self(networks))
    }

    fn authenticate(&mut self, who: &Connecting) -> Decision {
        let Ok(address) = who.remote_addr.parse::<IpAddr>() else { return pass() };
        let network = self.0.iter().find(|network| network.has(address));
        let Some(network) = network.filter(|_| who.username.is_none()) else { return pass() };
        let mut identity = named(&network.name);
        let presses = network.presses.iter().map(|presses| ask(PUBLISH, &presses.topics));
        let publish = network.publish.iter().map(|filter| rule(PUBLISH, filter, true));
        let subscribe = network.subscribe.iter().map(|filter| rule(SUBSCRIBE, filter, true));
        identity.rules = presses.chain(publish).chain(subscribe).collect();
        Decision::Accept(identity)
    }

    fn authorize(&mut self, question: &Question) -> bool {
        let networks = self.0.iter().filter(|network| network.name == question.name);
        networks.flat_map(|network| &network.presses).any(|presses| presses.has(&question.topic))
    }
}

impl Presses {
    fn read(fields: &mut Fields<'_>) -> Self {
        let topics = fields.required_string("topics");
        if topics.split('/').filter(|level| *level == "+").count() != 1 {
            fields.problem("topics", "must have one level +, the number of a press");
        }
        Self { topics, first: fields.i64("first", 1), last: fields.i64("last", i64::MAX) }
    }

    fn has(&self, topic: &str) -> bool {
        let mut levels = topic.split('/');
        for wanted in self.topics.split('/') {
            let fits = match (wanted, levels.next()) {
                ("#", _) => return true,
                ("+", Some(level)) => {
                    level.parse().is_ok_and(|number| (self.first..=self.last).contains(&number))
                }
                (wanted, level) => level == Some(wanted),
            };
            if !fits {
                return false;
            }
        }
        levels.next().is_none()
    }
}

impl Network {
    fn has(&self, address: IpAddr) -> bool {
        let number = |address: IpAddr| match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 4),
            IpAddr::V6(v6) => (v6.to_bits(), 6),
        };
        let ((ours, family), (theirs, other)) = (number(self.from), number(address));
        let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
        family == other && ours & mask == theirs & mask
    }
}

fn parse(network: &str) -> Option<(IpAddr, u8)> {
    let (from, bits) = network.split_once('/')?;
    let (from, bits): (IpAddr, u8) = (from.parse().ok()?, bits.parse().ok()?);
    (bits <= if from.is_ipv4() { 32 } else { 128 }).then_some((from, bits))
}

headworks_guest::access_plugin!(Gate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_its_addresses_and_no_others() {
        let has = |network: &str, address: &str| {
            let (from, bits) = parse(network).unwrap();
            let (presses, publish, subscribe) = (vec![], vec![], vec![]);
            let network = Network { from, bits, name: String::new(), presses, publish, subscribe };
            network.has(address.parse().unwrap())
        };
        assert!(has("10.1.4.0/24", "10.1.4.9") && !has("10.1.4.0/24", "10.1.5.9"));
        assert!(has("10.1.4.9/32", "10.1.4.9") && !has("10.1.4.9/32", "10.1.4.8"));
        assert!(has("0.0.0.0/0", "10.1.4.9") && !has("0.0.0.0/0", "::1"));
        assert!(has("fd00::/8", "fd12::1") && !has("fd00::/8", "fe80::1"));
        assert!(parse("10.0.0.0/33").is_none() && parse("10.0.0.0").is_none());
    }

    #[test]
    fn a_line_has_the_presses_of_its_numbers() {
        let presses = |topics: &str| Presses { topics: topics.into(), first: 1, last: 12 };
        let all = presses("acme/line-4/press/+/#");
        assert!(all.has("acme/line-4/press/1/temperature") && all.has("acme/line-4/press/12"));
        for other in ["0/x", "13/x", "-1/x", "x/x", "", "1x"] {
            assert!(!all.has(&format!("acme/line-4/press/{other}")), "{other}");
        }
        assert!(!all.has("acme/line-5/press/1/x") && !all.has("acme"));
        let one = presses("press/+/state");
        assert!(one.has("press/3/state") && !one.has("press/3/state/x") && !one.has("press/3"));
    }
}
