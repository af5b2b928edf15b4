//! Knows clients by the network that they come from: for controllers in a
//! production network that can be given no password. Whoever comes from
//! elsewhere, or shows a user name, is left to the next authenticator.
//!
//! ```yaml
//! networks:
//!   - { from: 10.1.4.0/24, name: line-4, publish: ["acme/line-4/#"], subscribe: ["acme/line-4/set/#"] }
//! ```

use std::net::IpAddr;

use headworks_guest::access::{Access, Connecting, Decision, PUBLISH, SUBSCRIBE, named, pass, rule};
use headworks_guest::config::{Config, Problem};
use headworks_guest::plugin::Context;

struct Gate(Vec<Network>);

struct Network {
    from: IpAddr,
    bits: u8,
    name: String,
    publish: Vec<String>,
    subscribe: Vec<String>,
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
        let publish = network.publish.iter().map(|filter| rule(PUBLISH, filter, true));
        let subscribe = network.subscribe.iter().map(|filter| rule(SUBSCRIBE, filter, true));
        identity.rules = publish.chain(subscribe).collect();
        Decision::Accept(identity)
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
            let network = Network { from, bits, name: String::new(), publish: vec![], subscribe: vec![] };
            network.has(address.parse().unwrap())
        };
        assert!(has("10.1.4.0/24", "10.1.4.9") && !has("10.1.4.0/24", "10.1.5.9"));
        assert!(has("10.1.4.9/32", "10.1.4.9") && !has("10.1.4.9/32", "10.1.4.8"));
        assert!(has("0.0.0.0/0", "10.1.4.9") && !has("0.0.0.0/0", "::1"));
        assert!(has("fd00::/8", "fd12::1") && !has("fd00::/8", "fe80::1"));
        assert!(parse("10.0.0.0/33").is_none() && parse("10.0.0.0").is_none());
    }
}
