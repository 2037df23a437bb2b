//! Infrastructure that both programs share.
//!
//! `tls` holds the certificates of servers and clients, `listener` accepts connections with or without TLS,
//! `call_limits` bounds what unknown callers may do on them,
//! `telemetry` exports logs, traces and metrics, `tally` counts events that are too many to log each, and
//! `health` checks whether a program is serving. Nothing
//! here depends on the purpose of the programs.

pub mod call_limits;
pub mod health;
pub mod listener;
pub mod tally;
pub mod telemetry;
pub mod tls;
