# What CI runs
ci:
    .ci/run

# Format, lint, test
check:
    cargo fmt
    cargo clippy --all-targets -- -D warnings
    cargo test

# Ratios to the bare upstream, with CPU and memory
bench:
    cargo bench

# Licences, sources and doubles of dependencies
deny:
    cargo deny check bans licenses sources
