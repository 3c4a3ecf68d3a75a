//! `shadowbox forget` and `shadowbox promote`.

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use shadowbox::config::Config;
use shadowbox::log::{EventLog, Request};
use shadowbox::supervisor::{Forgotten, holding};

use super::text::one_line;
use super::views::live;
use super::{Common, ask, running, send};

#[derive(Args)]
#[command(after_help = "\
Works while a runtime runs on the same data, and without. Projections that may have taken some of the events are rebuilt in
the shadow, if their modules are in the plugin folder; those without are named. shadowbox status says when they are done.

Example:
  shadowbox forget --source orders --stream order-17 --by 'dpo@example.com' --reason 'article 17, ticket 4711'")]
pub(super) struct Forget {
    /// The source of the events, by its exact name
    #[arg(long, value_name = "NAME")]
    source: String,
    /// Forget the events of this stream
    #[arg(long, value_name = "NAME", required_unless_present = "id")]
    stream: Option<String>,
    /// Forget the event with this id
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Forget the name of the stream, too
    #[arg(long, requires = "stream")]
    stream_name: bool,
    /// Who asks for it; it is recorded [default: the user's name]
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Why; it is recorded
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Forget {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let by = self.by.or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| "unknown".into());
        let Forget { source, stream, id, stream_name, reason, json, .. } = self;
        let done: Value = match running(&config) {
            Ok(address) => {
                let request = json!({
                    "source": source, "stream": stream, "id": id, "stream_name": stream_name, "by": by, "reason": reason,
                });
                send("POST", &format!("{address}/forget"), Some(&request))?
            }
            Err(_) => {
                let request = Request { source, stream, id, names: stream_name, by, reason };
                serde_json::to_value(at_rest(&config, &request).await?)?
            }
        };
        if json {
            say_json!("{}", serde_json::to_string_pretty(&done)?);
            return Ok(());
        }
        match &done["forgetting"] {
            Value::Null => say!("the log has no such event whose content is still there"),
            forgetting => {
                say!("{} events are forgotten (forgetting {})", forgetting["events"], forgetting["number"])
            }
        }
        for holding in done["projections"].as_array().into_iter().flatten() {
            let text = |field: &str| one_line(holding[field].as_str().unwrap_or_default()).into_owned();
            let views = holding["views"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let views = views.collect::<Vec<_>>().join(", ");
            let next = match holding["module"].as_bool() {
                Some(true) => "it is rebuilt; shadowbox status says when that is done, or waits for you",
                _ => "it is rebuilt when its module is in the plugin folder of a running shadowbox",
            };
            say!("{}, generation {}, may still have it ({views}); {next}", text("projection"), holding["generation"]);
        }
        Ok(())
    }
}

/// Without a runtime.
async fn at_rest(config: &Config, request: &Request) -> Result<Forgotten> {
    let log = EventLog::open(&config.data)?;
    let forgetting = log.forget(request)?;
    let live = live(config).await?;
    let projections = live.iter().filter_map(|live| holding(&log, live, false, drop)).collect();
    Ok(Forgotten { forgetting, projections })
}

#[derive(Args)]
pub(super) struct Promote {
    /// The projection's name
    projection: String,
    /// Drop the generation that waits; the live one stays
    #[arg(long)]
    discard: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Promote {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let config = common.existing()?;
        let (what, done) =
            if self.discard { ("discard", "is dropped") } else { ("promote", "takes the live one's place") };
        let answer: Value = ask("POST", &format!("{}/projections/{}/{what}", running(&config)?, self.projection))?;
        ensure!(answer["generation"].is_u64(), "the runtime did not answer as expected: {answer}");
        if self.json {
            say_json!("{answer}");
        } else {
            say!("generation {} of {} {done}", answer["generation"], self.projection);
        }
        Ok(())
    }
}
