//! The message that a client leaves behind, for when it is lost.

use super::Broker;
use super::inbound::{cut_device, retained_for, taken_in};
use crate::batch::flags;
use crate::stream::{AppendError, NewMessage, partition_of};

/// What CONNECT asked to be published when the client is lost.
pub struct Will {
    pub topic: Box<str>,
    pub payload: bytes::Bytes,
    /// As [`crate::properties`] lays them out.
    pub properties: Vec<u8>,
    pub flags: u16,
    pub delay_s: u32,
}

impl Will {
    /// Appends the will, waiting for room; `false` when the stream stopped or refuses it.
    pub async fn publish(self, broker: &Broker, client_id: &str) -> bool {
        let number = broker.route(&self.topic);
        let stream = &broker.streams[number];
        let span = broker.namespace.device_span(&self.topic);
        let fits = if span.is_some() { flags::FITS_NAMESPACE } else { 0 };
        let device = span.map_or(cut_device(client_id), |span| &self.topic[span]);
        let message = NewMessage {
            topic: &self.topic,
            payload: &self.payload,
            properties: &self.properties,
            route: "",
            device,
            partition: partition_of(device, stream.identity().partitions),
            flags: self.flags | fits,
            received_us: super::now_us(),
            event_us: 0,
        };
        loop {
            let appended = {
                let retained = retained_for(broker, &[message]);
                let appended = stream.append(&[message], &[]);
                if let Ok(appended) = appended {
                    taken_in(broker, number, &[message], appended, retained);
                    return true;
                }
                appended
            };
            match appended {
                Ok(_) => return true,
                Err(AppendError::Full | AppendError::NoSpace) => stream.writable().await,
                Err(_) => return false,
            }
        }
    }
}
