# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment and leaves its Python in $python.
#
# `jaxconv_environment EXTRAS` installs the project, editable, with these extras ("" or "test,parity").
# A stamp in the environment says what it was made from; while that stays so, nothing is done.
# PYTHON picks the interpreter. One of another version than python3 gets .venv-VERSION.

jaxconv_environment() {
    local extras=$1 interpreter=${PYTHON:-python3} version folder=.venv stamp wanted

    if ! version=$(jaxconv_python_version "$interpreter"); then
        echo "PYTHON=$interpreter does not run; it must be Python 3.11 or later" >&2
        return 2
    fi
    if [[ ! $version =~ ^3\.(1[1-9]|[2-9][0-9])\. ]]; then
        echo "PYTHON=$interpreter is Python $version; it must be Python 3.11 or later" >&2
        return 2
    fi
    if [[ -n ${PYTHON:-} && $(jaxconv_python_version python3) != "$version" ]]; then
        folder=.venv-${version%.*}
    fi
    # shellcheck disable=SC2034  # for the script that sources this one
    python=$folder/bin/python
    stamp=$folder/jaxconv-${extras//,/-}.stamp
    wanted="$version $(cksum <pyproject.toml) $PWD"
    if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return 0
    fi

    # An environment that is half made, or of another interpreter, is not worth mending.
    if [[ -d $folder ]] && {
        [[ -f $folder/jaxconv-installing ]] || ! "$python" -c "import pip" 2>/dev/null ||
            [[ $(jaxconv_python_version "$python") != "$version" ]]
    }; then
        echo "$folder is broken or of another Python; making it again" >&2
        rm -rf "$folder"
    fi
    if [[ ! -d $folder ]]; then
        echo "making $folder with Python $version" >&2
        "$interpreter" -m venv "$folder" || {
            rm -rf "$folder"
            echo "$interpreter could not make $folder" >&2
            return 1
        }
    fi
    echo "installing jaxconv${extras:+[$extras]} into $folder" >&2
    # Stays behind only when pip is killed: a pip that fails leaves what was there.
    touch "$folder/jaxconv-installing"
    if ! "$python" -m pip install --quiet --disable-pip-version-check \
        --editable ".${extras:+[$extras]}" >&2; then
        rm "$folder/jaxconv-installing"
        echo "pip could not install jaxconv${extras:+[$extras]} into $folder" >&2
        return 1
    fi
    rm "$folder/jaxconv-installing"
    printf '%s\n' "$wanted" >"$stamp"
}

jaxconv_python_version() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}
