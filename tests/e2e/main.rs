//! Trailer Images as its users meet it: both services in process, called over the network.
//!
//! `stack` starts the services, `engine` is a scripted Docker Engine at the wire, `proxy` cuts and stalls connections. The
//! other modules are tests, named by what they are about.

mod access;
mod dispatch;
mod engine;
mod input;
mod layers;
mod main_job;
mod proxy;
mod real_engine;
mod reflection;
mod stack;
mod watching;
