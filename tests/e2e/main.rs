//! End-to-end tests: both services in process, called over the network.
//!
//! `stack` starts the services, each on a `database` of its own; `client` calls them; `actor` plays a worker
//! and `issuer` an identity provider; `fake_engine` is a scripted Docker Engine, `registry` a real image
//! registry, `web_server` a server of files and Git repositories, and `proxy` cuts and stalls connections.
//! The other modules are tests, named after their subjects.

mod access;
mod actor;
mod answers;
mod artifact_audit;
mod authentication;
mod authority;
mod backoff;
mod base_image;
mod build_secrets;
mod build_sources;
mod cancellation;
mod client;
mod clients;
mod clocks;
mod consistency;
mod constraints;
mod context_formats;
mod contexts;
mod data_dir;
mod database;
mod debian_workspace;
mod deployment;
mod dispatch;
mod divergence;
mod docker_credentials;
#[path = "../faults/dockerd.rs"]
#[expect(dead_code, reason = "the fault tests use the rest")]
mod dockerd;
mod documents;
mod drain;
mod edits;
mod engine_fixture;
mod engine_versions;
mod etags;
mod eventually;
mod fairness;
mod fake_engine;
mod floods;
mod freshness;
mod fuzz;
mod generate;
mod groups;
mod hostile;
mod image_gc;
mod input;
mod issuer;
mod layers;
mod limits;
mod list_images;
mod main_job;
#[expect(dead_code, reason = "the fault tests use the rest")]
mod otlp_collector;
mod patience;
mod permissions;
mod pools;
mod previews;
#[path = "../faults/process.rs"]
mod process;
mod programs;
mod promises;
mod proxy;
mod raw;
mod real_engine;
mod reasons;
mod recovery;
mod references;
mod reflection;
mod registries;
mod registry;
mod registry_credentials;
mod relay;
mod remote_contexts;
mod resume;
mod retention;
mod rolling_restart;
mod secrets;
mod snapshots;
mod spool;
mod stack;
mod step_output;
mod telemetry;
mod tls;
mod trust;
mod unreachable;
mod unsupported_engine;
mod watch_images;
mod web_server;
mod writes;
