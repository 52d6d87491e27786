package acceptq_test

import (
	"cmp"
	"log"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
)

// Route the answers with a routing table other than the default one (setfib(2)). The sysctl
// net.fibs is the number of tables.
func ExampleWithControl_setFIB() {
	setFIB := func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SETFIB, 1) })
		return cmp.Or(cerr, err)
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(setFIB))
	if err != nil {
		log.Print(err)
		return
	}
	defer ln.Close()
	// Output:
}
