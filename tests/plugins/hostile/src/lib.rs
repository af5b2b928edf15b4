//! Does to its host what a bad plugin can, when a message's `do` asks for it;
//! keeps all other messages.

use headworks_guest::prelude::*;

struct Hostile;

impl Plugin for Hostile {
    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        config.fields().finish().map(|()| Self)
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        let wish = message.json("do").ok().flatten().map(|wish| wish.as_bytes().to_vec()).unwrap_or_default();
        match wish.as_slice() {
            b"\"loop\"" => loop {
                std::hint::black_box(());
            },
            b"\"trap\"" => panic!("a message asked for it"),
            b"\"eat\"" => {
                let mut eaten: Vec<Vec<u8>> = Vec::new();
                loop {
                    eaten.push(std::hint::black_box(vec![1; 1 << 20]));
                }
            }
            // A topic that nobody may publish to.
            b"\"nonsense\"" => out.emit().topic("a/#").verdict(),
            b"\"flood\"" => {
                for _ in 0..100_000 {
                    out.emit().payload(&[b'x'; 1000]).verdict();
                }
                out.emit().verdict()
            }
            _ => Verdict::Keep,
        }
    }
}

headworks_guest::plugin!(Hostile);
