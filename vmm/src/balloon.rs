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

#[cfg(test)]
mod tests {
    use brume_api::{BalloonPatch, BalloonStatisticsPatch, HintingStart};

    use super::*;

    fn config() -> Config {
        Config {
            amount_mib: 5,
            stats_polling_interval_s: 1,
            ..Config::default()
        }
    }

    /// What is answered to `request` by a machine with or without a balloon.
    fn answer(request: &BalloonRequest, balloon: Option<Config>) -> Result<Answer, Fault> {
        let balloon_control = balloon
            .as_ref()
            .map(|config| open(config).unwrap().control());
        let controls = Controls {
            balloon: balloon_control,
            ..Controls::default()
        };
        let mut config = VmConfig {
            balloon,
            ..VmConfig::default()
        };
        call(request, &controls, &mut config)
    }

    fn text(request: &BalloonRequest, balloon: Option<Config>) -> String {
        answer(request, balloon).unwrap_err().message
    }

    fn all() -> [BalloonRequest; 7] {
        [
            BalloonRequest::Get,
            BalloonRequest::GetStatistics,
            BalloonRequest::GetHinting,
            BalloonRequest::SetAmount(BalloonPatch { amount_mib: 1 }),
            BalloonRequest::SetStatistics(BalloonStatisticsPatch {
                stats_polling_interval_s: 3,
            }),
            BalloonRequest::StartHinting(HintingStart::default()),
            BalloonRequest::StopHinting,
        ]
    }

    #[test]
    fn before_the_start_only_the_configuration_can_be_had() {
        let mut machine = VmConfig::default();
        for request in &all()[1..] {
            assert!(answer_before_start(request, &machine).is_none());
        }
        let none = answer_before_start(&BalloonRequest::Get, &machine).unwrap();
        let text = "Balloon config error: No balloon device found.";
        assert_eq!(none.unwrap_err().message, text);
        machine.balloon = Some(config());
        let shown = answer_before_start(&BalloonRequest::Get, &machine).unwrap();
        assert_eq!(shown, Answer::json(&config()));
    }

    #[test]
    fn a_machine_without_a_balloon_says_so() {
        for (at, request) in all().iter().enumerate() {
            let prefix = if at < 2 { READ } else { CHANGE };
            let expected = format!("{prefix}: Failed perform action on device: Device not found");
            assert_eq!(text(request, None), expected);
        }
    }

    #[test]
    fn refusals_have_firecrackers_texts() {
        let [_, statistics, hinting, amount, interval, start, _] = all();
        for (request, stats_polling_interval_s, expected) in [
            (
                &amount,
                1,
                "Balloon update error: Balloon: Device not activated yet.",
            ),
            (
                &hinting,
                1,
                "Balloon update error: Balloon: Attempting to use hinting when not enabled",
            ),
            (
                &start,
                1,
                "Balloon update error: Balloon: Attempting to use hinting when not enabled",
            ),
            (
                &statistics,
                0,
                "Internal VMM error: Balloon: Received stats query when stats are disabled.",
            ),
            (
                &interval,
                0,
                "Balloon update error: Balloon: Statistics cannot be enabled/disabled after \
                 activation.",
            ),
        ] {
            let config = Config {
                stats_polling_interval_s,
                ..config()
            };
            assert_eq!(text(request, Some(config)), expected, "{request:?}");
        }
    }

    #[test]
    fn a_change_shows_in_the_configuration() {
        let mut machine = VmConfig {
            balloon: Some(config()),
            ..VmConfig::default()
        };
        let balloon = open(&config()).unwrap();
        let controls = Controls {
            balloon: Some(balloon.control()),
            ..Controls::default()
        };
        let [get, _, _, _, interval, ..] = all();
        call(&interval, &controls, &mut machine).unwrap();
        let expected = Config {
            stats_polling_interval_s: 3,
            ..config()
        };
        assert_eq!(call(&get, &controls, &mut machine), Answer::json(&expected));
    }
}
