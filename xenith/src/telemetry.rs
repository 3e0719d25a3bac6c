//! Logs and spans of a daemon.
//!
//! Log lines go to standard error, as text or JSON, filtered by target and level. Spans leave the process only where a
//! collector is configured; elsewhere they are but the context of log lines. A trace does not yet follow a call from one
//! process into another.

use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::{Deserialize, Serialize};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{Log, Traces};

/// How log lines look.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object for each line.
    Json,
}

/// What openraft says of each exchange that fails comes twenty times a second as long as a host is away; that it is away
/// is said once, by the controller.
const DEFAULT_FILTER: &str = "info,openraft=warn,openraft::core::heartbeat=error,openraft::replication=error";
/// How long a daemon that ends waits for its last spans to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Keeps spans flowing while the daemon runs.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Starts logging, and exporting spans where that is configured. Called once, inside the runtime.
pub fn start(
    service: &'static str,
    host: &str,
    log: &Log,
    format: Option<LogFormat>,
    traces: &Traces,
) -> anyhow::Result<Telemetry> {
    let spoken = std::env::var("XENITH_LOG").or_else(|_| std::env::var("RUST_LOG")).ok().or_else(|| log.filter.clone());
    let spoken = spoken.as_deref().unwrap_or(DEFAULT_FILTER);
    let filter = EnvFilter::try_new(spoken).with_context(|| format!("log filter {spoken:?}"))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format.unwrap_or(log.format) {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let provider = traces.otlp.as_deref().map(|address| exporter(service, host, address)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer().with_tracer(provider.tracer("xenith")).with_filter(EnvFilter::new("info"))
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans)
        .try_init()
        .context("logging was started twice")?;
    Ok(Telemetry { provider })
}

fn exporter(service: &'static str, host: &str, address: &str) -> anyhow::Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(address)
        .with_timeout(FLUSH_LIMIT)
        .build()
        .with_context(|| format!("traces.otlp = {address:?}"))?;
    let resource = Resource::builder()
        .with_service_name(service)
        .with_attribute(opentelemetry::KeyValue::new("host.id", host.to_owned()))
        .build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

impl Telemetry {
    /// Sends what is left, within a limit.
    pub fn finish(self) {
        if let Some(provider) = self.provider
            && let Err(error) = provider.shutdown_with_timeout(FLUSH_LIMIT)
        {
            tracing::debug!(%error, "last spans were not sent");
        }
    }
}
