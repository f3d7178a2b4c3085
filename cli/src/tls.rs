// SPDX-License-Identifier: Apache-2.0
//! The certificates of one side of a move: the arguments that `brume receive` and
//! `brume ctl migrate` share.

use std::path::PathBuf;

use brume_api::MigrationTls;
use clap::Args;

use crate::exit::Failure;
use crate::snapshot::absolute;

/// The certificates of one side.
#[derive(Args, Default)]
pub(crate) struct TlsArgs {
    /// Certificates, in PEM form, of those whom the other side's may be signed by: with this, nobody
    /// can read or change what moves, and both sides prove who they are
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<PathBuf>,
    /// Our own certificate, and what leads from it to one of --tls-ca, in PEM form
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, in PEM form
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    tls_key: Option<PathBuf>,
}

impl TlsArgs {
    /// The same in the words of the API, for a process in another folder; `None` for a connection
    /// without.
    ///
    /// # Errors
    ///
    /// A path is empty, or this folder is gone.
    pub(crate) fn tls(&self, server_name: Option<String>) -> Result<Option<MigrationTls>, Failure> {
        let (Some(ca), Some(certificate), Some(key)) =
            (&self.tls_ca, &self.tls_cert, &self.tls_key)
        else {
            return Ok(None);
        };
        Ok(Some(MigrationTls {
            ca: absolute(ca)?,
            certificate: absolute(certificate)?,
            key: absolute(key)?,
            server_name,
        }))
    }
}
