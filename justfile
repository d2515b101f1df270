# What CI runs
ci:
    .ci/run

# Format, lint, test
check:
    cargo fmt
    cargo clippy --all-targets -- -D warnings
    cargo test

# larder beside others that do the same work: benches/README.md
bench *ARGS: rivals
    cargo bench -- {{ARGS}}

# Installs what larder is measured beside, on Debian and its like
rivals:
    #!/bin/sh
    set -eu
    command -v apt-get >/dev/null || { echo 'no apt-get: what is missing is left out'; exit 0; }
    sudo=; test "$(id -u)" = 0 || sudo=sudo
    wanted=
    for package in nginx squid-openssl mitmproxy; do
        dpkg -s "$package" >/dev/null 2>&1 || wanted="$wanted $package"
    done
    test -z "$wanted" || $sudo apt-get install -y --no-install-recommends $wanted

# Licences, sources and doubles of dependencies
deny:
    cargo deny check bans licenses sources
