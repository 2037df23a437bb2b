//! How the programs meet their surroundings, which both do in the same way.
//!
//! `tls` holds what a server shows and asks for, `listener` accepts connections with or without it, `telemetry` tells what
//! goes on, and `health` asks a program whether it serves. Nothing here knows what the programs are for.

pub mod health;
pub mod listener;
pub mod telemetry;
pub mod tls;
