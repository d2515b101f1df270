//! The names and addresses that a CA certificate permits (RFC 5280 section 4.2.1.10).

use std::net::IpAddr;

use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::X509Certificate;

use crate::config::HostName;

/// What a CA's name constraints permit.
#[derive(Debug, PartialEq)]
pub struct Permitted {
    dns: Vec<String>,
    /// Address and mask, four or sixteen bytes each.
    ips: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Permitted {
    /// None where the certificate is unconstrained in DNS names or in addresses.
    pub fn of(cert: &X509Certificate<'_>) -> Option<Self> {
        let constraints =
            cert.extensions()
                .iter()
                .find_map(|ext| match ext.parsed_extension() {
                    ParsedExtension::NameConstraints(c) => Some(c),
                    _ => None,
                })?;
        let mut this = Self {
            dns: Vec::new(),
            ips: Vec::new(),
        };
        for subtree in constraints.permitted_subtrees.as_ref()? {
            match &subtree.base {
                GeneralName::DNSName(name) => this.dns.push(name.to_ascii_lowercase()),
                GeneralName::IPAddress(bytes) if bytes.len() == 8 || bytes.len() == 32 => {
                    let (address, mask) = bytes.split_at(bytes.len() / 2);
                    this.ips.push((address.to_vec(), mask.to_vec()));
                }
                _ => {}
            }
        }
        (!this.dns.is_empty() && !this.ips.is_empty()).then_some(this)
    }

    pub fn covers(&self, name: &HostName) -> bool {
        match name.ip() {
            Some(ip) => {
                let bytes = match ip {
                    IpAddr::V4(ip) => ip.octets().to_vec(),
                    IpAddr::V6(ip) => ip.octets().to_vec(),
                };
                self.ips.iter().any(|(address, mask)| {
                    address.len() == bytes.len()
                        && (0..bytes.len()).all(|i| bytes[i] & mask[i] == address[i] & mask[i])
                })
            }
            None => self.dns.iter().any(|base| {
                name.as_str()
                    .strip_suffix(base.trim_start_matches('.'))
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }),
        }
    }
}
