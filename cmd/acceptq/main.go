// Acceptq shows the accept queues of all TCP listeners of this machine, and says what is
// wrong with them. It needs no change to any server. It reads what the kernel lists to
// everybody, and as root it also names the processes of other users.
//
//	go install github.com/acceptq/acceptq/cmd/acceptq@latest
//	acceptq -h
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"
)

const usage = `Acceptq shows the accept queues of all TCP listeners of this machine.

  acceptq [-w] [-json] [-all] [-n]   all listeners, the fullest first
  acceptq check [-for 10s] [-all]    what is wrong, and the command that mends it
  acceptq who ADDRESS                who uses a port: why "address already in use"
  acceptq waiting ADDRESS            the clients that a listener has not accepted

ADDRESS is a port, or an IP address and a port: 8080, :8080, 127.0.0.1:8080, [::1]:8080.

Flags of the table:
  -w       show it again each second, with the drops per second
  -json    write JSON; with -w one object a line
  -n       do not look for processes, which costs the most on a large machine
Flag of check:
  -for d   watch for this time first, and report only losses of this time
Flag of both:
  -all     read the network namespaces of all processes and those with a name in
           /run/netns, and so every container; needs root

For who and waiting in a container, run: nsenter -t PID -n acceptq who ADDRESS
Check sees queues only. It does not see a server that accepts and then does not answer.

Columns of the table:
  PROCESS  a process that holds the socket, and how many others do; ? is unknown
  QUEUED   connections that wait for accept(2), and how many fit; one more does not get in
  LIMIT    the backlog that the kernel granted to listen(2)
  DROPS    packets that the socket has dropped; some harm nobody, see acceptq check

Exit status:
  check    0 nothing is wrong, 1 a warning, 2 clients are lost or wait too long
  who      0 the port is in use, 1 it is free
  waiting  0 a socket listens there, 1 none does
  all      3 the command cannot tell, or it was called in a wrong way
`

// The exit status of monitoring plugins.
const (
	statusOK = iota
	statusWarning
	statusCritical
	statusUnknown
)

func main() {
	// The command does one thing after the other. Other threads would only cost CPU time, on a
	// machine that may be overloaded.
	runtime.GOMAXPROCS(1)
	os.Exit(run(context.Background(), terminal(os.Stdout), os.Args[1:], os.Stdout, os.Stderr))
}

// errUsage is the error if the command was called in a wrong way.
var errUsage = errors.New("run acceptq -h for help")

// run runs the command and returns its exit status.
func run(ctx context.Context, s style, args []string, stdout, stderr io.Writer) int {
	status, err := dispatch(ctx, s, args, stdout)
	switch {
	case err == nil:
		return status
	case errors.Is(err, flag.ErrHelp):
		if _, err = io.WriteString(stdout, usage); err == nil {
			return statusOK
		}
	case errors.Is(err, errors.ErrUnsupported) && runtime.GOOS != "linux":
		err = fmt.Errorf("unsupported on %s: %w", runtime.GOOS, err)
	}
	fmt.Fprintln(stderr, "acceptq:", err)
	return statusUnknown
}

// watchInterval is the time between two tables of -w.
const watchInterval = time.Second

func dispatch(ctx context.Context, s style, args []string, out io.Writer) (status int, err error) {
	command := ""
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet("acceptq", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var (
		all, watch, asJSON, unnamed bool
		watched                     time.Duration
	)
	addresses := 0
	switch command {
	case "":
		flags.BoolVar(&all, "all", false, "")
		flags.BoolVar(&watch, "w", false, "")
		flags.BoolVar(&unnamed, "n", false, "")
		flags.BoolVar(&asJSON, "json", false, "")
	case "check":
		flags.BoolVar(&all, "all", false, "")
		flags.DurationVar(&watched, "for", 0, "")
	case "who", "waiting":
		addresses = 1
	case "help":
		return statusOK, flag.ErrHelp
	default:
		return statusUnknown, fmt.Errorf("no command %q: %w", command, errUsage)
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return statusOK, err
		}
		return statusUnknown, fmt.Errorf("%w: %w", err, errUsage)
	}
	switch n := flags.NArg(); {
	case command == "" && n > 0:
		return statusUnknown, fmt.Errorf("%q comes before the flags: acceptq %s -flag: %w", flags.Arg(0), flags.Arg(0), errUsage)
	case n > addresses && addresses == 0:
		return statusUnknown, fmt.Errorf("%s takes no address, and so not %q: %w", command, flags.Arg(0), errUsage)
	case n != addresses:
		return statusUnknown, fmt.Errorf("%s takes one address, not %d: %w", command, n, errUsage)
	}
	if watched < 0 {
		return statusUnknown, fmt.Errorf("-for %v is negative: %w", watched, errUsage)
	}
	switch command {
	case "":
		return statusOK, list(ctx, s, listing{all: all, watch: watch, json: asJSON, unnamed: unnamed, every: watchInterval}, out)
	case "check":
		return check(ctx, all, watched, out)
	}
	at, err := parseTarget(flags.Arg(0))
	if err != nil {
		return statusUnknown, err
	}
	if command == "who" {
		return who(ctx, at, out)
	}
	return waiting(ctx, at, out)
}

// pause waits for d. It returns false if ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
