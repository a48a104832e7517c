#!/bin/sh
# An environment in which Petals 2.2.0.post1 runs, for `benchmarks/swarm.py --petals-python DIRECTORY/bin/python`.
#
#     sh benchmarks/make_petals_peer.sh DIRECTORY [PYTHON]     # some minutes; Python 3.11 on Linux x86-64
#
# Petals' own dependencies are of 2023. What differs from them here, and why:
# - torch and numpy are those that still install; petals_peer.py gives back the names that torch has moved since.
# - hivemind 1.1.10.post2 fetches its libp2p daemon while it is built; the one in the wheel of 1.1.12 takes its place.
# - tensor-parallel, bitsandbytes and petals come without their dependencies, which would pull in another torch.
set -eu

[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
directory=$1
python=${2:-python3.11}
requirements=$(dirname "$0")/petals_requirements.txt

"$python" -m venv "$directory"
pip="$directory/bin/python -m pip --disable-pip-version-check"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

$pip install -r "$requirements"
$pip install 'setuptools<70' wheel  # in a step of its own: torch declares a later one, for compiling, and hivemind's setup.py needs this

$pip download --no-deps --no-build-isolation --no-binary hivemind -d "$work" hivemind==1.1.10.post2
$pip download --no-deps -d "$work" hivemind==1.1.12
tar -xzf "$work"/hivemind-1.1.10.post2.tar.gz -C "$work"
source=$work/hivemind-1.1.10.post2
"$directory/bin/python" -m zipfile -e "$work"/hivemind-1.1.12-*.whl "$work/wheel"
cp "$work/wheel/hivemind/hivemind_cli/p2pd" "$source/hivemind/hivemind_cli/p2pd"
chmod +x "$source/hivemind/hivemind_cli/p2pd"
sed -i 's/^\( *\)download_p2p_daemon()$/\1pass/' "$source/setup.py"
$pip install --no-deps --no-build-isolation "$source"

$pip install --no-deps tensor-parallel==1.0.23 bitsandbytes==0.41.1 petals==2.2.0.post1
"$directory/bin/python" "$(dirname "$0")/petals_peer.py" --version
