//! Does to its host what a bad access plugin can, when a client id asks for it;
//! the others it knows by their id.

use headworks_guest::access::{
    Access, Connecting, Decision, Identity, NOT_AUTHORIZED, PUBLISH, Property, Question, RECEIVE, SUBSCRIBE,
    ask, named, refuse, rule,
};
use headworks_guest::config::{Config, Problem};
use headworks_guest::plugin::Context;

struct Hostile;

impl Access for Hostile {
    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        config.fields().finish().map(|()| Self)
    }

    fn authenticate(&mut self, who: &Connecting) -> Decision {
        let good = || Identity { rules: vec![rule(PUBLISH, "#", true)], ..named(&who.client_id) };
        let attribute = |name: &str| Property { origin: 1, name: name.into(), value: b"x".to_vec() };
        match who.client_id.as_str() {
            "loop" => loop {
                std::hint::black_box(());
            },
            "trap" => panic!("a client asked for it"),
            "eat" => {
                let mut eaten: Vec<Vec<u8>> = Vec::new();
                loop {
                    eaten.push(std::hint::black_box(vec![1; 1 << 20]));
                }
            }
            "bad-filter" => {
                Decision::Accept(Identity { rules: vec![rule(PUBLISH, "a/#/b", true)], ..good() })
            }
            "bad-effect" => {
                let mut odd = rule(PUBLISH, "#", true);
                odd.effect = 7;
                Decision::Accept(Identity { rules: vec![odd], ..good() })
            }
            id if id.starts_with("asks") => {
                let all = PUBLISH | SUBSCRIBE | RECEIVE;
                let rules = vec![
                    rule(RECEIVE, "asked/open/#", true),
                    ask(all, "asked/#"),
                    rule(PUBLISH | SUBSCRIBE, "#", true),
                ];
                Decision::Accept(Identity { rules, ..good() })
            }
            "device" => Decision::Accept(Identity { device: Some("press-7".into()), ..good() }),
            "no-device" => Decision::Accept(Identity { device: Some(String::new()), ..good() }),
            "told" => {
                let told = format!("{} {}", who.listener, who.transport);
                let told = Property { origin: 1, name: "told".into(), value: told.into_bytes() };
                Decision::Accept(Identity { attributes: vec![told], ..good() })
            }
            "shown" => {
                let hex = |der: &Vec<u8>| der.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                let shown = who.certificates.iter().map(hex).collect::<Vec<_>>().join(" then ");
                let shown = Property { origin: 1, name: "shown".into(), value: shown.into_bytes() };
                Decision::Accept(Identity { attributes: vec![shown], ..good() })
            }
            "no-name" => Decision::Accept(named("")),
            "flood" => {
                Decision::Accept(Identity { rules: vec![rule(PUBLISH, "#", true); 100_000], ..good() })
            }
            "liar" => Decision::Accept(Identity { attributes: vec![attribute("username")], ..good() }),
            "attributes" => Decision::Accept(Identity { attributes: vec![attribute("badge")], ..good() }),
            "short" => Decision::Accept(Identity { valid_for_s: 1, ..good() }),
            "refused" => refuse(NOT_AUTHORIZED, "a client asked for it"),
            "unasked" => Decision::More(Vec::new()),
            _ if who.properties.iter().any(|property| property.name == "auth-method") => {
                Decision::More(who.exchange.to_string().into_bytes())
            }
            _ => Decision::Accept(good()),
        }
    }

    fn go_on(&mut self, exchange: u64, data: &[u8]) -> Decision {
        match data {
            b"more" => Decision::More(exchange.to_string().into_bytes()),
            b"trap" => panic!("a client asked for it"),
            b"loop" => loop {
                std::hint::black_box(());
            },
            b"less" => {
                Decision::Accept(Identity { rules: vec![rule(PUBLISH, "ok/#", true)], ..named("known") })
            }
            _ => Decision::Accept(Identity { rules: vec![rule(PUBLISH, "#", true)], ..named("known") }),
        }
    }

    fn authorize(&mut self, question: &Question) -> bool {
        assert!(question.name == question.client_id, "{question:?}");
        match question.topic.rsplit('/').next() {
            Some("trap") => panic!("a client asked for it"),
            Some("slow") => loop {
                std::hint::black_box(());
            },
            Some("publish") => question.action == PUBLISH,
            Some("subscribe") => question.action != RECEIVE,
            Some(last) => last != "no",
            None => false,
        }
    }
}

headworks_guest::access_plugin!(Hostile);
