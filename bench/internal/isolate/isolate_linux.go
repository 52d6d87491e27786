// Package isolate runs a program in a network namespace of its own. There it may set
// sysctls, all counters start at 0, and only the loopback of the namespace is reachable.
package isolate

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command returns a command that starts this program again, in new network and mount
// namespaces. Without root it also creates a user namespace. The program must call Enter.
func Command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	return cmd
}

// Explain says what to do if a Command did not start.
func Explain(cmd *exec.Cmd, err error) error {
	if err != nil && cmd.ProcessState == nil {
		return fmt.Errorf("cannot make a network namespace (%w); run as root or allow unprivileged user namespaces", err)
	}
	return err
}

// Enter brings the loopback up and allows many clients.
func Enter() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return err
	}
	return SetSysctl("net.ipv4.ip_local_port_range", "1024 65535")
}

// SetSysctl sets a sysctl of this network namespace.
func SetSysctl(name string, value any) error {
	return os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), fmt.Append(nil, value), 0)
}
