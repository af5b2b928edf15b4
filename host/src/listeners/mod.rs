//! Entries for devices. Each listener takes messages in its own protocol,
//! appends them to a stream and acknowledges only what the stream made durable.
//! MQTT is the first; HTTP, CoAP and AMQP will be its neighbours.

pub mod mqtt;
