// SPDX-License-Identifier: Apache-2.0
//! Requests to the balloon of a machine. The texts of faults are Firecracker's.

use brume_api::config::{Balloon as Config, VmConfig};
use brume_api::{Answer, BalloonHinting, BalloonRequest, BalloonStatistics, Fault};
use brume_virtio::balloon::{
    Balloon, BalloonConfig, BalloonControl, BalloonError, BalloonNewError,
};

use crate::controls::Controls;

/// How faults of reads begin.
const READ: &str = "Internal VMM error";
/// How faults of changes begin, and those of everything about hinting.
const CHANGE: &str = "Balloon update error";

/// Makes the balloon that `config` describes.
pub(crate) fn open(config: &Config) -> Result<Balloon, BalloonNewError> {
    Balloon::new(BalloonConfig {
        amount_mib: config.amount_mib,
        deflate_on_oom: config.deflate_on_oom,
        statistics_interval_s: config.stats_polling_interval_s,
        free_page_hinting: config.free_page_hinting,
        free_page_reporting: config.free_page_reporting,
    })
}

/// Answers what can be answered before the start; `None` for the rest.
pub(crate) fn answer_before_start(
    request: &BalloonRequest,
    config: &VmConfig,
) -> Option<Result<Answer, Fault>> {
    if *request != BalloonRequest::Get {
        return None;
    }
    Some(match &config.balloon {
        Some(balloon) => Answer::json(balloon),
        None => Err(Fault::new("Balloon config error: No balloon device found.")),
    })
}

/// Carries out a request after the start; what it changes shows in `config` from then on.
pub(crate) fn call(
    request: &BalloonRequest,
    controls: &Controls,
    config: &mut VmConfig,
) -> Result<Answer, Fault> {
    let prefix = match request {
        BalloonRequest::Get | BalloonRequest::GetStatistics => READ,
        _ => CHANGE,
    };
    let balloon = controls.balloon(prefix)?;
    let fault = |error: BalloonError| Fault::new(format!("{prefix}: Balloon: {error}"));
    let done = match request {
        BalloonRequest::Get => return Answer::json(&config.balloon),
        BalloonRequest::GetStatistics => return statistics(balloon).map_err(fault)?,
        BalloonRequest::GetHinting => return hinting(balloon).map_err(fault)?,
        BalloonRequest::SetAmount(patch) => balloon.set_target(patch.amount_mib),
        BalloonRequest::SetStatistics(patch) => {
            balloon.set_statistics_interval_s(patch.stats_polling_interval_s)
        }
        BalloonRequest::StartHinting(start) => balloon.start_hinting(start.acknowledge_on_stop),
        BalloonRequest::StopHinting => balloon.stop_hinting(),
    };
    done.map_err(fault)?;
    if let Some(config) = &mut config.balloon {
        config.amount_mib = balloon.target_mib();
        config.stats_polling_interval_s = balloon.statistics_interval_s();
    }
    Ok(Answer::done())
}

fn statistics(balloon: &BalloonControl) -> Result<Result<Answer, Fault>, BalloonError> {
    let statistics = balloon.statistics()?;
    let (target, actual) = (balloon.target_pages(), balloon.actual_pages());
    let shown = BalloonStatistics::new(target, actual, statistics.values);
    Ok(Answer::json(&shown))
}

fn hinting(balloon: &BalloonControl) -> Result<Result<Answer, Fault>, BalloonError> {
    let status = balloon.hinting_status()?;
    Ok(Answer::json(&BalloonHinting {
        host_cmd: status.host_cmd,
        guest_cmd: status.guest_cmd,
    }))
}
