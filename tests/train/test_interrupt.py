"""The flag that signals set, and that handlers are given back."""

import os
import signal

import pytest

from jaxconv.train import interrupt


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_says_so_once(kind, capfd):
    before = signal.getsignal(kind)
    with interrupt.catching():
        assert not interrupt.requested()
        os.kill(os.getpid(), kind)
        assert interrupt.requested()
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it; still only a request
    assert signal.getsignal(kind) == before
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_each_block_starts_without_a_request():
    with interrupt.catching():
        os.kill(os.getpid(), signal.SIGTERM)
    with interrupt.catching():
        assert not interrupt.requested()


def test_outside_a_block_ctrl_c_is_the_usual_exception():
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupt.catching():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
