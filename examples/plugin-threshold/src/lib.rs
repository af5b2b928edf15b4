//! The plugin of the README: readings above a limit go to the route `alert`.

use headworks_guest::prelude::*;

struct Threshold {
    max: f64,
}

impl Plugin for Threshold {
    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        let mut fields = config.fields();
        let threshold = Threshold { max: fields.f64("max", 30.0) };
        fields.finish().map(|()| threshold)
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        match message.json("value") {
            Ok(Some(value)) if value.as_f64() > Some(self.max) => out.emit().route("alert").verdict(),
            Ok(_) => Verdict::Keep,
            Err(error) => error.into(),
        }
    }
}

headworks_guest::plugin!(Threshold);
