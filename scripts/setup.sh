# SPDX-License-Identifier: GPL-2.0-or-later
# Sourced by the other scripts: installs what is missing (Debian's packages as root, Python's
# in an environment of the cache) and sets $nearmetal and $python. Does nothing the second time.
# $more_packages and $extras (of pyproject.toml, such as test), set before, are installed as well.

repo=$(cd "$(dirname "$0")/.." && pwd)
cache=${NEARMETAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nearmetal}

# the number of Debian's gcc: gcc-multilib and every cross compiler remove each other, what it
# depends on has no such conflict and is all that QEMU's option ROMs need
case $(. /etc/os-release 2>/dev/null && echo "${VERSION_ID-}") in 12) gcc=12 ;; *) gcc=14 ;; esac

# what the harness runs and what the builds need (doctor lists the programs)
packages="
build-essential gcc-$gcc-multilib flex bison bc libelf-dev libssl-dev ccache cpio zstd lz4 kmod patch
rsync git perl pkg-config bzip2 xz-utils python3-venv
libglib2.0-dev zlib1g-dev libpixman-1-dev libslirp-dev libattr1-dev uuid-dev libcap-dev
mmdebstrap squashfs-tools-ng busybox-static debian-archive-keyring uidmap
seabios ovmf openssh-client util-linux
xorriso isolinux syslinux-common
${more_packages-}
"

say() { echo "==> $*" >&2; }

die() {
	echo "nearmetal: $1" >&2
	echo "  hint: $2" >&2
	exit 3
}

missing=
if command -v dpkg-query >/dev/null 2>&1; then
	for package in $packages; do
		state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
		[ "$state" = installed ] || missing="$missing $package"
	done
else
	die "this is no Debian system" "use Debian 12 or 13 (a container will do)"
fi
if [ -n "$missing" ]; then
	as_root=
	if [ "$(id -u)" != 0 ]; then
		command -v sudo >/dev/null 2>&1 ||
			die "packages are missing:$missing" "as root: apt-get install --no-install-recommends$missing"
		as_root=sudo
	fi
	say "installing Debian packages (needs root):$missing"
	$as_root apt-get update -qq >&2 ||
		die "apt-get update failed" "check the network and the machine's apt sources"
	# shellcheck disable=SC2086
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
		--no-install-recommends $missing >"${TMPDIR:-/tmp}/nearmetal-apt.$$" 2>&1 || {
		tail -n 5 "${TMPDIR:-/tmp}/nearmetal-apt.$$" >&2
		die "the packages could not be installed" \
			"as root: apt-get install --no-install-recommends$missing"
	}
	rm -f "${TMPDIR:-/tmp}/nearmetal-apt.$$"
fi

mkdir -p "$cache" || die "the cache directory $cache cannot be made" "set NEARMETAL_CACHE to another"
wanted=$( (
	cat "$repo/pyproject.toml"
	echo "$repo"
	python3 --version
) | sha256sum | cut -c 1-16)
venv=$cache/venv/harness-$wanted
python=$venv/bin/python
nearmetal=$venv/bin/nearmetal
mark=$venv/complete${extras:+-$extras}
if [ ! -e "$mark" ]; then
	(
		flock 9
		[ -e "$mark" ] && exit 0
		say "installing the harness' Python packages"
		if [ ! -e "$venv/complete" ]; then
			rm -rf "$venv"
			python3 -m venv "$venv"
		fi &&
			"$python" -m pip install -qq --disable-pip-version-check \
				--editable "$repo${extras:+[$extras]}" >&2 &&
			touch "$venv/complete" "$mark"
	) 9>"$cache/venv.lock" ||
		die "the Python packages could not be installed" "check the network, then run again"
fi
