#!/bin/sh
# Debian's road to a wasm32-unknown-unknown standard library, for machines that
# reach package mirrors but not static.rust-lang.org.
#
#   plugins/wasm-toolchain.sh PREFIX
#
# Unpacks Debian's rustc-web and its standard library's source into PREFIX (no
# root, nothing installed), builds the library once for wasm and leaves
#   PREFIX/rustc     a compiler to be used as RUSTC=
#   PREFIX/rust-lld  a linker for the target
# About a minute and 500 MB the first time; says so and returns at once after.
set -eu

prefix=${1:?usage: wasm-toolchain.sh PREFIX}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
target=wasm32-unknown-unknown
say() { printf 'wasm-toolchain: %s\n' "$*" >&2; }

if [ -x "$prefix/rustc" ] && [ -e "$prefix/ready" ]; then
    exit 0
fi

for tool in apt-get apt-cache dpkg cargo; do
    command -v "$tool" >/dev/null || { say "needs $tool, which is not here; install the target with 'rustup target add $target' instead"; exit 1; }
done

# A linker: the one that rustup ships beside its compiler, or an installed lld.
linker=$(find "$(rustc --print sysroot)/lib/rustlib" -name rust-lld -type f 2>/dev/null | head -n 1)
[ -n "$linker" ] || linker=$(command -v wasm-ld || true)
[ -n "$linker" ] || { say "no linker for wasm: neither rust-lld in the Rust toolchain nor wasm-ld (package lld) is here"; exit 1; }

if ! apt-cache show rustc-web >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || { say "the package lists do not know rustc-web: run 'apt-get update' as root"; exit 1; }
    say "apt-get update (the package lists do not know rustc-web)"
    apt-get update -qq >&2
fi
depends() { apt-cache depends "$1" | sed -n 's/^ *Depends: *<*\([^>]*\)>*$/\1/p' | grep -E "$2" | head -n 1; }
libstd=$(depends libstd-rust-web-dev '^libstd-rust-web-[0-9]')
llvm=$(depends "$libstd" '^libllvm[0-9]')
packages="rustc-web libstd-rust-web-dev rust-web-src $libstd $llvm"

say "no $target here; unpacking $packages from the package mirror into $prefix (nothing is installed)"
rm -rf "$prefix/debs" "$prefix/root" "$prefix/ready"
mkdir -p "$prefix/debs" "$prefix/root"
# shellcheck disable=SC2086 # a list of words
(cd "$prefix/debs" && apt-get download -qq $packages >&2)
for deb in "$prefix"/debs/*.deb; do dpkg -x "$deb" "$prefix/root"; done
rm -rf "$prefix/debs"

# Below PREFIX, as the wrapper finds them: PREFIX may be moved.
below() { dirname "$(cd "$prefix" && find root/usr/lib -name "$1" | head -n 1)"; }
libs=$(below 'librustc_driver-*.so')
llvm_libs=$(below 'libLLVM*.so*')
cat >"$prefix/rustc" <<WRAPPER
#!/bin/sh
prefix=\$(cd "\$(dirname "\$0")" && pwd)
LD_LIBRARY_PATH="\$prefix/$libs:\$prefix/$llvm_libs\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" exec "\$prefix/root/usr/bin/rustc" "\$@"
WRAPPER
chmod +x "$prefix/rustc"
ln -sf "$linker" "$prefix/rust-lld"

say "building the standard library for $target with $("$prefix/rustc" --version)"
empty="$prefix/empty"
rm -rf "$empty" && mkdir -p "$empty/src"
printf '[package]\nname = "empty"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n' >"$empty/Cargo.toml"
: >"$empty/src/lib.rs"
(
    cd "$empty"
    # Panic locations of the library are compiled in: without a path of this machine.
    cargo_home=${CARGO_HOME:-$HOME/.cargo}
    flags="-Cembed-bitcode=yes --remap-path-prefix=$prefix/root/usr=/rustc --remap-path-prefix=$cargo_home=/cargo"
    RUSTC="$prefix/rustc" RUSTC_BOOTSTRAP=1 RUSTFLAGS="$flags" CARGO_TARGET_DIR="$empty/target" \
        cargo build --release -Zbuild-std=std,panic_abort --target "$target" --quiet
)
libdir=$("$prefix/rustc" --print target-libdir --target "$target")
mkdir -p "$libdir"
cp "$empty/target/$target/release/deps/"*.rlib "$libdir/"
rm -rf "$empty"
: >"$prefix/ready"
say "ready: $prefix/rustc"
