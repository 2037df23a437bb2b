//! Trailer Images as its users meet it: both services in process, called over the network.
//!
//! `stack` starts the services, each on a `database` of its own, `client` calls them, `actor` plays a worker, `issuer` an
//! identity provider, `engine` is a scripted Docker Engine at the wire, `registry` a real one of images, `proxy` cuts and stalls connections. The other modules
//! are tests, named by what they are about.

mod access;
mod actor;
mod all_restarted;
mod answers;
mod authentication;
mod authority;
mod backoff;
mod base_image;
mod cancelling;
mod client;
mod clocks;
mod collecting;
#[expect(dead_code, reason = "the fault tests use the rest")]
mod collector;
mod consistency;
mod contexts;
mod data_dir;
mod database;
mod debian_workspace;
mod deploying;
mod dispatch;
mod divergence;
#[path = "../faults/dockerd.rs"]
#[expect(dead_code, reason = "the fault tests use the rest")]
mod dockerd;
mod documents;
mod draining;
mod editing;
mod engine;
mod engine_versions;
mod fairness;
mod freshness;
mod fuzzing;
mod generating;
mod hostile;
mod input;
mod issuer;
mod layers;
mod limits;
mod listing;
mod main_job;
mod patience;
mod permissions;
mod previews;
#[path = "../faults/process.rs"]
mod process;
mod programs;
mod proxy;
mod raw;
mod real_engine;
mod reasons;
mod recovery;
mod reflection;
mod registries;
mod registry;
mod relay;
mod resuming;
mod retention;
mod secrets;
mod snapshots;
mod spooling;
mod stack;
mod telling;
mod tls;
mod unreachable;
mod unsupported;
mod watching;
mod writes;
