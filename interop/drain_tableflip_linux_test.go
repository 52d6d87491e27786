package interop

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/cloudflare/tableflip"
)

// flipEnv is set in the processes that tableflip upgrades.
const flipEnv = "ACCEPTQ_TEST_FLIP"

// The heir of a socket is reached by its clients after its parent's Drain, and
// after the parent is gone.
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
		cmd.Env = append(os.Environ(), flipEnv+"=1")
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
				say(t, addr, "end") // whoever it is that holds the socket
			}
		}()

		const generations = 4
		seen := make(map[string]bool)
		for range generations {
			parent := say(t, addr, "who")
			seen[parent] = true
			if answer := say(t, addr, "upgrade"); answer != parent {
				t.Fatalf("%s answers for %s", answer, parent)
			}
			// The parent says on the pipe when it is drained and about to end.
			for line := ""; line != "drained "+parent+"\n"; {
				if line, err = lines.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			for range 5 {
				if heir := say(t, addr, "who"); heir == parent {
					t.Fatal("the parent still answers")
				}
			}
		}
		say(t, addr, "end")
		ended = true
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

// say sends a word to whoever listens, and returns its process id.
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

// flip is one such process.
func flip(t *testing.T) error {
	upg, err := tableflip.New(tableflip.Options{UpgradeTimeout: patience})
	if err != nil {
		return err
	}
	defer upg.Stop()
	inherited, err := upg.Listen("tcp", "127.0.0.1:0")
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

	end := make(chan struct{})
	loop := make(chan struct{})
	go func() {
		defer close(loop)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				word, _ := bufio.NewReader(c).ReadString('\n')
				fmt.Fprintln(c, os.Getpid())
				switch strings.TrimSpace(word) {
				case "upgrade":
					// Not before this one is ready and its own parent gone.
					for deadline := time.Now().Add(patience); upg.Upgrade() != nil && time.Now().Before(deadline); {
						<-time.After(time.Millisecond)
					}
				case "end":
					close(end)
				}
			}()
		}
	}()
	if err := upg.Ready(); err != nil {
		return err
	}
	select {
	case <-end:
	case <-upg.Exit():
		if err := ln.Drain(within(t, patience)); err != nil {
			return err
		}
		ln.Close()
		fmt.Println("drained", os.Getpid())
	}
	ln.Close()
	<-loop
	return nil
}
