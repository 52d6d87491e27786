package interop

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/cloudflare/tableflip"
)

// flipEnv is set in the processes that tableflip upgrades.
const flipEnv = "ACCEPTQ_TEST_FLIP"

// A server upgrades itself on SIGHUP under load. Each parent drains the socket that it
// shares with its child, and ends. No client is lost, and clients reach the child after
// the drain. The drops of the socket show that the drain kept new clients out for a
// while: the queue never overflows, so there are no other drops.
func TestDrainTableflip(t *testing.T) {
	if os.Getenv(flipEnv) != "" {
		if err := flip(t); err != nil {
			t.Fatal(err)
		}
		return
	}
	inEachWay(t, func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self, "-test.run=^TestDrainTableflip$", "-test.timeout=55s")
		cmd.Env = append(os.Environ(), flipEnv+"=1",
			"GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0") // otherwise each ends a second later
		cmd.Stderr = os.Stderr
		// Every process has a copy of this pipe: it ends when all have ended.
		stdout, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdout.Close()
		cmd.Stdout = w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		lines := bufio.NewReader(stdout)
		var addr string
		if _, err := fmt.Fscanln(lines, &addr); err != nil {
			t.Fatal(err)
		}

		ended := false
		defer func() {
			if !ended {
				say(t, addr, "end") // to any process that holds the socket
			}
		}()

		clients := newCrowd(8, func(int) error { return visit(addr) })
		defer clients.end()
		const generations = 4
		seen := make(map[string]bool)
		var dropped uint32
		for range generations {
			parent := say(t, addr, "who")
			seen[parent] = true
			pid, err := strconv.Atoi(parent)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			// The parent writes to the pipe when it is drained and about to end.
			var drops uint32
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if _, err := fmt.Sscanf(line, "drained "+parent+" %d\n", &drops); err == nil {
					break
				}
			}
			dropped += drops
			for range 5 {
				if heir := say(t, addr, "who"); heir == parent {
					t.Fatal("the parent still answers")
				}
			}
		}
		clients.end()
		say(t, addr, "end")
		ended = true
		t.Logf("%d clients answered, %d lost, the first: %v; %d packets dropped by drains",
			clients.ok.Load(), clients.lost.Load(), clients.failure(), dropped)
		if clients.lost.Load() > 0 {
			t.Error("an upgrade loses requests")
		}
		if dropped == 0 {
			t.Error("no drain kept a client out: this test shows nothing")
		}
		if _, err := io.Copy(io.Discard, lines); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if len(seen) != generations {
			t.Errorf("%d processes, not %d", len(seen), generations)
		}
	})
}

// say sends a word to the process that accepts, and returns its process id.
func say(t *testing.T, addr, word string) string {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, word); err != nil {
		t.Fatal(err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// visit is one client. It asks for the id of the process that answers.
func visit(addr string) error {
	c, err := dial(addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, "who"); err != nil {
		return err
	}
	_, err = bufio.NewReader(c).ReadString('\n')
	return err
}

// flip is one such process.
func flip(t *testing.T) error {
	upg, err := tableflip.New(tableflip.Options{UpgradeTimeout: patience})
	if err != nil {
		return err
	}
	defer upg.Stop()
	// The Listen of tableflip makes an MPTCP socket, and a drain cannot keep clients
	// out of it.
	inherited, err := upg.ListenWithCallback("tcp", "127.0.0.1:0", func(_, addr string) (net.Listener, error) {
		return acceptq.ListenTCP(addr)
	})
	if err != nil {
		return err
	}
	ln, err := acceptq.Wrap(inherited)
	if err != nil {
		return err
	}
	defer ln.Close()
	if !upg.HasParent() {
		fmt.Println(ln.Addr())
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		for range hangup {
			// Upgrade only after this process is ready and its parent has ended.
			for deadline := time.Now().Add(patience); upg.Upgrade() != nil && time.Now().Before(deadline); {
				<-time.After(time.Millisecond)
			}
		}
	}()

	end := make(chan struct{})
	var answers sync.WaitGroup
	defer answers.Wait()
	loop := make(chan struct{})
	go func() {
		defer close(loop)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			answers.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				word, _ := bufio.NewReader(c).ReadString('\n')
				fmt.Fprintln(c, os.Getpid())
				if strings.TrimSpace(word) == "end" {
					close(end)
				}
			})
		}
	}()
	if err := upg.Ready(); err != nil {
		return err
	}
	select {
	case <-end:
	case <-upg.Exit():
		before, err := ln.Stats()
		if err != nil {
			return err
		}
		if err := drainShared(within(t, patience), ln); err != nil {
			return err
		}
		after, err := ln.Stats()
		if err != nil {
			return err
		}
		ln.Close()
		fmt.Println("drained", os.Getpid(), uint32(after.Drops)-uint32(before.Drops))
	}
	ln.Close()
	<-loop
	return nil
}
