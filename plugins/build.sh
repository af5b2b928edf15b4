#!/bin/sh
# Builds the plugins to wasm.
#
#   plugins/build.sh                to target/plugins/NN-NAME.wasm, and the
#                                   examples' to target/bench-plugins/NAME.wasm
#   plugins/build.sh --refresh      the same, then into plugins/prebuilt/, with
#                                   the hash of the sources
#   plugins/build.sh --check-stale  is plugins/prebuilt/ made of these sources?
#                                   Needs no toolchain.
#   plugins/build.sh --prebuilt     copies plugins/prebuilt/ to target/plugins/
#   plugins/build.sh --setup        only what is needed to build
#
# What builds them: the target wasm32-unknown-unknown of the active toolchain,
# if it is installed; else, with WASM_STD=debian, Debian's packages in a private
# folder (see wasm-toolchain.sh); else `rustup target add` installs it.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
target=wasm32-unknown-unknown
plugins="10-normalize 20-enrich 30-route"
examples="plugin-bench plugin-threshold plugin-network-gate hostile hostile-access"
say() { printf 'plugins: %s\n' "$*" >&2; }

# One hash over names and contents of what the .wasm files are made of.
source_hash() {
    {
        find guest-sdk/src plugins/*/src wit -type f
        echo guest-sdk/Cargo.toml
        ls plugins/*/Cargo.toml
    } | LC_ALL=C sort | while read -r file; do sha256sum "$file"; done | sha256sum | cut -d ' ' -f 1
}

check_stale() {
    if [ "$(source_hash)" != "$(cat plugins/prebuilt/SOURCE.sha256 2>/dev/null)" ]; then
        say "plugins/prebuilt is older than its sources: run 'plugins/build.sh --refresh' and commit it"
        return 1
    fi
    (cd plugins/prebuilt && sha256sum --check --quiet WASM.sha256)
}

set_up() {
    libdir=$(rustc --print target-libdir --target "$target" 2>/dev/null || true)
    if [ -n "$libdir" ] && ls "$libdir"/libstd-*.rlib >/dev/null 2>&1; then
        return
    fi
    if [ "${WASM_STD:-}" = debian ]; then
        plugins/wasm-toolchain.sh target/wasm-toolchain
        toolchain=$root/target/wasm-toolchain
        export RUSTC="$toolchain/rustc"
        export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER="$toolchain/rust-lld"
        return
    fi
    command -v rustup >/dev/null || {
        say "$target is not installed and rustup is not here: install the target, or set WASM_STD=debian"
        exit 1
    }
    say "rustup target add $target"
    rustup target add "$target" >&2
}

build() {
    set_up
    # No path of this machine in the files, so that the same sources and
    # compiler give the same bytes anywhere.
    cargo_home=${CARGO_HOME:-$HOME/.cargo}
    flags="-Ctarget-feature=+simd128,+bulk-memory"
    flags="$flags --remap-path-prefix=$cargo_home=/cargo --remap-path-prefix=$root=/headworks"
    packages=$(for name in $plugins $examples; do printf ' -p %s' "${name#[0-9][0-9]-}"; done)
    # shellcheck disable=SC2086 # a list of options
    env -u RUSTFLAGS CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="$flags" CARGO_INCREMENTAL=0 \
        cargo build --quiet --profile plugin --target "$target" --target-dir target/wasm --lib $packages
    built=target/wasm/$target/plugin
    mkdir -p target/plugins target/bench-plugins
    for name in $plugins; do place "$built/${name#[0-9][0-9]-}.wasm" "target/plugins/$name.wasm"; done
    for name in $examples; do
        place "$built/$(echo "$name" | tr - _).wasm" "target/bench-plugins/${name#plugin-}.wasm"
    done
    say "built target/plugins/*.wasm and target/bench-plugins/*.wasm"
}

# A rename: a host that watches the folder never sees half of a file.
place() {
    cmp -s "$1" "$2" && return
    cp "$1" "$2.part"
    chmod 644 "$2.part"
    mv "$2.part" "$2"
}

refresh() {
    build
    mkdir -p plugins/prebuilt
    for name in $plugins; do place "target/plugins/$name.wasm" "plugins/prebuilt/$name.wasm"; done
    (cd plugins/prebuilt && sha256sum -- *.wasm >WASM.sha256)
    source_hash >plugins/prebuilt/SOURCE.sha256
    say "refreshed plugins/prebuilt: commit it"
}

case "${1:-}" in
"") build ;;
--refresh) refresh ;;
--check-stale) check_stale ;;
--prebuilt)
    mkdir -p target/plugins
    for name in $plugins; do place "plugins/prebuilt/$name.wasm" "target/plugins/$name.wasm"; done
    ;;
--setup) set_up ;;
*)
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
