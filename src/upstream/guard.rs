//! Which addresses may be connected to: judged after resolution, so that a name which points
//! inside (DNS rebinding) gains nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Who can reach larder decides how far it reaches for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every listener is on loopback: all that the user could reach themselves, but not the
    /// machine's own services.
    LikeTheUser,
    /// Others can connect: public addresses only.
    PublicOnly,
}

/// Refuses an address; the words say what it is.
pub fn judge(ip: IpAddr, reach: Reach) -> Result<(), &'static str> {
    let translated = matches!(ip, IpAddr::V6(v6) if v6.segments()[..3] == [0x64, 0xff9b, 1]);
    let ip = unmap(ip);
    let verdict = match ip {
        IpAddr::V4(ip) => class_v4(ip),
        IpAddr::V6(ip) => class_v6(ip),
    };
    let verdict = match verdict {
        // Where in it the IPv4 address stands is the translator's own business (RFC 8215).
        Class::Public if translated => Class::Private("a local NAT64 address"),
        verdict => verdict,
    };
    match (verdict, reach) {
        (Class::Public, _) | (Class::Private(_), Reach::LikeTheUser) => Ok(()),
        (Class::Private(what), Reach::PublicOnly) | (Class::Local(what), _) => Err(what),
    }
}

enum Class {
    Public,
    /// Somebody's own network
    Private(&'static str),
    /// This machine or its link
    Local(&'static str),
}

/// The IPv4 address within an IPv4-mapped, 6to4 or NAT64 one: it is what is reached in the end.
fn unmap(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else {
        return ip;
    };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return v4.into();
    }
    let s = v6.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::from([a, b, c, d])
    };
    match s {
        // RFC 6052's well-known prefix, and RFC 8215's local one
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x64, 0xff9b, 1, _, _, _, high, low] => {
            embedded(high, low)
        }
        [0x2002, high, low, ..] => embedded(high, low),
        // IPv4-compatible (deprecated), but not :: and ::1
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => embedded(high, low),
        _ => ip,
    }
}

fn class_v4(ip: Ipv4Addr) -> Class {
    let [a, b, c, _] = ip.octets();
    match (a, b, c) {
        (0, ..) => Class::Local("an address of this network (0.0.0.0/8)"),
        (127, ..) => Class::Local("a loopback address"),
        (169, 254, _) => Class::Local("a link-local address"),
        (224..=239, ..) => Class::Local("a multicast address"),
        (255, 255, 255) if ip.is_broadcast() => Class::Local("the broadcast address"),
        (10, ..) | (172, 16..=31, _) | (192, 168, _) => Class::Private("a private address"),
        (100, 64..=127, _) => Class::Private("a carrier-grade NAT address"),
        (192, 0, 0) | (198, 18..=19, _) | (240..=255, ..) => Class::Private("a reserved address"),
        _ => Class::Public,
    }
}

fn class_v6(ip: Ipv6Addr) -> Class {
    let first = ip.segments()[0];
    if ip.is_unspecified() || ip.is_loopback() {
        return Class::Local("a loopback address");
    }
    match first {
        0xfe80..=0xfebf => Class::Local("a link-local address"),
        0xff00.. => Class::Local("a multicast address"),
        0xfc00..=0xfdff => Class::Private("a private address"),
        0xfec0..=0xfeff => Class::Private("a site-local address"),
        _ => Class::Public,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(ip: &str) -> [bool; 2] {
        let ip = ip.parse().expect(ip);
        [Reach::LikeTheUser, Reach::PublicOnly].map(|reach| judge(ip, reach).is_ok())
    }

    #[test]
    fn addresses_are_judged_by_where_they_end() {
        for public in [
            "1.1.1.1",
            "2606:4700::1",
            "64:ff9b::101:101",
            "2002:101:101::",
        ] {
            assert_eq!(allowed(public), [true, true], "{public}");
        }
        for private in [
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "198.18.0.1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "2002:a00:1::",
            "64:ff9b:1::101:101",
        ] {
            assert_eq!(allowed(private), [true, false], "{private}");
        }
        for local in [
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "169.254.169.254",
            "224.0.0.1",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "::127.0.0.1",
            "64:ff9b:1::169.254.169.254",
            "255.255.255.255",
        ] {
            assert_eq!(allowed(local), [false, false], "{local}");
        }
    }
}
