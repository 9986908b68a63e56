"""Ctrl-C and SIGTERM, locks, checksums: what the programs' ends rest on."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent import futures

import pytest

from farms_jax.errors import InputError
from farms_jax.programs.exits import reported
from farms_jax.programs.files import CHECKSUMS, atomic, damaged_files, write_checksums, write_text
from farms_jax.programs.locking import locked
from farms_jax.programs.stopping import Stopped, hold_stops, stop_signals_raise


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_stopped_says_so_and_how_to_go_on(number, status, capsys):
    with pytest.raises(SystemExit) as ended, reported("prog", "; go on with --resume"):
        os.kill(os.getpid(), number)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"\nprog: stopped by {signal.Signals(number).name}; go on with --resume\n"


def test_a_stop_is_held_back_until_it_is_looked_for(capsys):
    steps = []
    with pytest.raises(Stopped) as stopped, hold_stops() as stop:
        for step in range(5):
            assert not stop
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            steps.append(step)
            stop.obey()
    assert (steps, stopped.value.signal) == ([0, 1, 2], signal.SIGINT)
    assert "stopping after this step" in capsys.readouterr().err


def test_a_stop_that_nobody_looked_for_is_raised_at_the_end():
    with pytest.raises(Stopped), hold_stops():
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_signal_stops_at_once():
    reached = []
    with pytest.raises(Stopped), hold_stops():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(2)
    assert reached == [1]


def test_a_stop_stays_a_stop_whatever_is_made_of_its_error():
    with pytest.raises(Stopped) as stopped, stop_signals_raise():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped as error:
            raise RuntimeError("in a callback") from error
    assert stopped.value.signal == signal.SIGTERM


def test_a_stop_that_a_destructor_swallows_comes_again():
    class Stops:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped), stop_signals_raise():
        thing = Stops()
        del thing
        time.sleep(600)
        pytest.fail("the stop was lost")


def test_a_program_ends_without_waiting_for_its_threads():
    program = """
import sys, threading, time
from farms_jax.programs.exits import run_and_end
threading.Thread(target=time.sleep, args=(3600,)).start()
run_and_end(lambda: sys.exit(3))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=600, check=False).returncode == 3


def test_an_error_of_the_disk_says_where(tmp_path):
    with pytest.raises(OSError, match="numbers.txt") as raised, atomic(tmp_path / "numbers.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "numbers.txt")
    assert list(tmp_path.iterdir()) == []


def test_links_and_pipes_are_written_to_and_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    link, pipe = tmp_path / "link.txt", tmp_path / "pipe"
    link.symlink_to("folder/real.txt")
    for text in ("1", "2"):
        write_text(link, text)
    assert link.is_symlink()
    assert (tmp_path / "folder" / "real.txt").read_text() == "2"
    os.mkfifo(pipe)
    link.unlink()
    link.symlink_to(f"/dev/fd/{(reader := os.open(pipe, os.O_RDWR))}")  # as /dev/stdout
    for path in (pipe, link):
        write_text(path, "3")
        assert os.read(reader, 10) == b"3"
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_handlers_are_put_back():
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with hold_stops(), stop_signals_raise():
        assert handlers() != before
    assert handlers() == before


def test_a_thread_other_than_the_main_one_leaves_signals_alone():
    def work():
        with hold_stops() as stop:
            stop.obey()

    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_a_folder_is_of_one_process_as_long_as_it_lives(tmp_path):
    hold = f"""
from farms_jax.programs.locking import locked; import pathlib, time
with locked(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is at work there"), locked(tmp_path):
            pytest.fail("held twice")
        process.kill()
    for _ in range(2):  # it is let go at the end, too
        with locked(tmp_path), locked(tmp_path / "deep"):
            pass


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    (tmp_path / "deep" / "b.bin").write_bytes(b"b")
    write_checksums(tmp_path)
    return tmp_path


def test_checksums_are_those_of_sha256sum(folder):
    assert damaged_files(folder) == []
    assert subprocess.run(["sha256sum", "-c", "--quiet", CHECKSUMS], cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize("content", [bytes(500) + b"\1" + bytes(499), bytes(999), bytes(1001), None])
def test_every_damage_is_found(folder, content):
    path = folder / "a.bin"
    path.unlink() if content is None else path.write_bytes(content)
    assert damaged_files(folder) == [path]


@pytest.mark.parametrize("content", [b"", b"no checksums\n", b"\xff\xfe", b"abc  a.bin", None])
def test_unreadable_checksums_are_damage_themselves(folder, content):
    path = folder / CHECKSUMS
    path.unlink() if content is None else path.write_bytes(content)
    assert damaged_files(folder) == [path]


def test_a_list_that_lacks_a_file_was_cut_off_where_that_is_asked(folder):
    (folder / "c.bin").write_bytes(b"c")
    assert damaged_files(folder) == []
    assert damaged_files(folder, exact=True) == [folder / CHECKSUMS]
